"""Embed images into an index, and change it: `python -m instdisc.embed RUN [--data.path IMAGES] --output INDEX`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.settings.embed import EmbedConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked for and say what the index holds now.

    Returns:
        See `instdisc.common.command.run`; 1 also if --verify finds something broken.
    """
    return command.run(_embed, arguments)


def _embed(arguments: Sequence[str]) -> int:
    config = parse(arguments)
    from instdisc.index.commands import embed  # takes seconds

    return embed(config)


def parse(arguments: Sequence[str]) -> EmbedConfig:
    """Read the command line; see `instdisc.common.command.read_options`."""
    return command.read_options(
        EmbedConfig,
        arguments,
        program="instdisc.embed",
        description="Embed images into an index that can be searched, and add, remove and check them.",
    )


if __name__ == "__main__":
    sys.exit(main())
