"""Evaluate a run: `python -m instdisc.evaluate RUN_OR_INDEX [--protocols knn,linear] [--queries.path IMAGES] …`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.settings.evaluation import PROTOCOL_NAMES, EvaluateConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocols asked for and print their figures.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_evaluate, arguments, level=logging.INFO)


def _evaluate(arguments: Sequence[str]) -> None:
    config = parse(arguments)
    from instdisc.evaluation.protocols import evaluate  # takes seconds

    evaluate(config)


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Read the command line; see `instdisc.common.command.read_options`."""
    return command.read_options(
        EvaluateConfig,
        arguments,
        program="instdisc.evaluate",
        description=f"Evaluate the embeddings of a run. Protocols: {', '.join(PROTOCOL_NAMES)}.",
    )


if __name__ == "__main__":
    sys.exit(main())
