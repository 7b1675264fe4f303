"""The protocols of an evaluation by name, and running those that were asked for."""

from __future__ import annotations

import logging
from typing import Any

from instdisc.common.errors import ConfigError
from instdisc.evaluation import (
    clusters,
    duplicates,
    finetune,
    knn,
    label_free,
    linear,
    page,
    statistics,
    strangers,
    tsne,
    unseen,
)
from instdisc.evaluation.context import Evaluation, ProtocolFunction
from instdisc.settings.evaluation import EvaluateConfig
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

PROTOCOLS: dict[str, ProtocolFunction] = {
    "knn": knn.run,
    "linear": linear.run,
    "finetune": finetune.run,
    "unseen": unseen.run,
    "statistics": statistics.run,
    "label-free": label_free.run,
    "duplicates": duplicates.run,
    "strangers": strangers.run,
    "clusters": clusters.run,
    "map": tsne.run,
    "page": page.run,
}
"""One for each of `instdisc.settings.evaluation.PROTOCOL_NAMES`. The field of `EvaluateConfig` of the same name, with _
for -, holds the settings of each."""


def evaluate(config: EvaluateConfig) -> None:
    """Run the protocols; write `NAME.json` of each and print its figures as soon as it is done.

    Raises:
        ConfigError: Settings that do not fit each other or the run, or images that are missing or cannot be used. One
            of a protocol is raised after the others have run.
        SnapshotError: There is no whole snapshot.
        ClusterError: The actors could not be run.
    """
    with Evaluation(config.evaluation) as evaluation:
        logger.info(
            "%s: snapshot of step %d with %d rows; results go to %s",
            config.evaluation.source,
            evaluation.source.snapshot.step,
            evaluation.source.snapshot.num_rows,
            evaluation.output,
        )
        failed: list[str] = []
        for name in config.chosen_protocols():
            try:
                result = PROTOCOLS[name](evaluation, getattr(config, name.replace("-", "_")))
            except (ConfigError, DataError) as error:
                failed.append(f"{name}: {error}")
                continue
            path = evaluation.write(name, result)
            print(
                "\n".join([f"{name}  ({result.get('page', path)})", *_figures(result["summary"])]), flush=True
            )
    if failed:
        raise ConfigError("; ".join(failed))


def _figures(summary: dict[str, Any]) -> list[str]:
    """Shares as percentages, other numbers as they are."""
    width = max(map(len, summary), default=0) + 2
    return [
        f"  {name:<{width}}"
        + (f"{100 * value:6.2f}%" if isinstance(value, float) and 0 <= value <= 1 else f"{value:>7}")
        for name, value in summary.items()
    ]
