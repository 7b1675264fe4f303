"""A page and an API over an index: `python -m instdisc.serve INDEX`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.settings.serve import ServeConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, which end a service as they should: with status 0.

    Returns:
        See `instdisc.common.command.run`; 130 only after a signal before it was up.
    """
    return command.run(_serve, arguments)


def _serve(arguments: Sequence[str]) -> None:
    config = parse(arguments)
    from instdisc.serving.deployment import serve  # takes seconds

    serve(config)


def parse(arguments: Sequence[str]) -> ServeConfig:
    """Read the command line; see `instdisc.common.command.read_options`."""
    return command.read_options(
        ServeConfig,
        arguments,
        program="instdisc.serve",
        description="Serve a page and an API that search an index.",
    )


if __name__ == "__main__":
    sys.exit(main())
