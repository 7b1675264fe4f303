"""Evaluate a run: `python -m instdisc.evaluate RUN_OR_SNAPSHOT [--protocols knn,linear] [--queries.path IMAGES] …`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from cluster.errors import ClusterError, SnapshotError
from instdisc.common.errors import ConfigError
from instdisc.evaluation import finetune, knn, linear, page, statistics, unseen
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
    "page": page.run,
}
"""Run in this order, whatever the order they are asked for in: the page shows what the others found. The field of the
same name of `EvaluateConfig` holds the settings of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocols asked for and print their figures.

    Returns:
        0, or 2 after an error that the user can put right, 1 after one of the cluster or of a disk, 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        evaluate(config)
    except (ConfigError, DataError, SnapshotError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ClusterError, OSError) as error:
        logger.debug("", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Read the command line.

    Args:
        arguments: Without the program's name.

    Raises:
        ConfigError: An unknown protocol, or a value out of its range.
        SystemExit: Help was asked for (status 0); an unknown option or a value of the wrong kind (status 2).
    """
    try:
        config: EvaluateConfig = tyro.cli(
            EvaluateConfig,
            args=arguments,
            prog="python -m instdisc.evaluate",
            description=f"Measure what the embeddings of a run are worth. Protocols: {', '.join(PROTOCOLS)}.",
        )
    except (
        ValueError
    ) as error:  # tyro reports those of groups of options itself, but not of options without a group
        raise ConfigError(str(error)) from error
    chosen_protocols(config)
    return config


def chosen_protocols(config: EvaluateConfig) -> list[str]:
    """Names of the protocols to run, in the order of the table.

    Raises:
        ConfigError: One is unknown, or there is none.
    """
    asked = [name.strip() for name in config.protocols.split(",") if name.strip()]
    unknown = [name for name in asked if name not in PROTOCOLS]
    if unknown or not asked:
        raise ConfigError(
            f"--protocols is {config.protocols!r}: expected one or more of {', '.join(PROTOCOLS)}, separated by commas"
        )
    return [name for name in PROTOCOLS if name in asked]


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
        for name in chosen_protocols(config):
            try:
                result = PROTOCOLS[name](evaluation, getattr(config, name))
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


if __name__ == "__main__":
    sys.exit(main())
