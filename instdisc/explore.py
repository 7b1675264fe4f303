"""See what is in a collection: `python -m instdisc.explore INDEX` finds duplicates, strangers and clusters."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence

import tyro

from instdisc.common import command
from instdisc.settings.evaluation import EXPLORED, EvaluateConfig, EvaluationConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocols that need no labels and no queries, and draw their page.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_explore, arguments, level=logging.INFO)


def _explore(arguments: Sequence[str]) -> None:
    config = parse(arguments)
    from instdisc.evaluation.protocols import evaluate  # takes seconds

    evaluate(config)


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Read the command line, which is that of `instdisc.evaluate`; see `instdisc.common.command.read_options`."""
    return command.read_options(
        EvaluateConfig,
        arguments,
        program="instdisc.explore",
        description="Find near duplicates, strangers and clusters in an index or a run, map and draw them.",
        default=EvaluateConfig(
            evaluation=EvaluationConfig(source=tyro.MISSING), protocols=",".join([*_explored(), "page"])
        ),
    )


def _explored() -> list[str]:
    has_map = importlib.util.find_spec("openTSNE") is not None
    return [name for name in EXPLORED if name != "map" or has_map]


if __name__ == "__main__":
    sys.exit(main())
