"""Export a network, or vectors: `python -m instdisc.export RUN_OR_INDEX --format onnx|parquet|…`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.settings.export import VECTOR_FORMATS, ExportConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a network or vectors, and say how to use the file.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_export, arguments)


def _export(arguments: Sequence[str]) -> None:
    config = command.read_options(
        ExportConfig, arguments, program="instdisc.export", description="Export a trained network or vectors."
    )
    if config.format in VECTOR_FORMATS:
        from instdisc.index.export import export_vectors

        print(export_vectors(config))
        return
    from instdisc.runs.export import export  # takes seconds

    print(export(config))


if __name__ == "__main__":
    sys.exit(main())
