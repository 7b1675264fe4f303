"""A page and an API over an index: `python -m instdisc.serve INDEX`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

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


def application(args: dict[str, Any]) -> Any:
    """The same for a manifest: what Ray Serve deploys as `import_path: instdisc.serve:application`.

    Args:
        args: `options`, a list: the command line. The port and the replicas' processors are Serve's to say.

    Raises:
        ConfigError: An option is wrong, or there is no token where one is needed.
    """
    from instdisc.serving.deployment import deployed

    return deployed(parse([str(option) for option in args["options"]]))


if __name__ == "__main__":
    sys.exit(main())
