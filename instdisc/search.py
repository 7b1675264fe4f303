"""Find the nearest images of any image: `python -m instdisc.search RUN_OR_INDEX IMAGE…`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.settings.evaluation import SearchConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and draw the nearest rows of every image.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_search, arguments)


def _search(arguments: Sequence[str]) -> None:
    config = command.read_options(
        SearchConfig,
        arguments,
        program="instdisc.search",
        description="Find the nearest training images of any image.",
    )
    from instdisc.evaluation.search import search  # takes seconds

    print(search(config))


if __name__ == "__main__":
    sys.exit(main())
