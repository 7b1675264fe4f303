"""What a run or a snapshot holds, and whether it is whole: `python -m instdisc.inspect PATH`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from instdisc.common import command


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What is inspected."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A run directory, a directory of snapshots, one snapshot or an index, here or at a URL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is there, then what is broken.

    Returns:
        See `instdisc.common.command.run`; 1 also if something is broken.
    """
    return command.run(_inspect, arguments)


def _inspect(arguments: Sequence[str]) -> int:
    config = parse(arguments)
    from instdisc.runs.inspection import inspect  # takes seconds

    return inspect(config.path)


def parse(arguments: Sequence[str]) -> InspectConfig:
    """Read the command line; see `instdisc.common.command.read_options`."""
    return command.read_options(
        InspectConfig,
        arguments,
        program="instdisc.inspect",
        description="Show the contents of a run or a snapshot.",
    )


if __name__ == "__main__":
    sys.exit(main())
