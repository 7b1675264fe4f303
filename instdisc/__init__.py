"""Instance discrimination: learn image embeddings by telling every image apart from every other one.

Example:
    ```python
    import instdisc

    run = instdisc.open_run("runs/sample")
    scores, rows = run.nearest(run.embed(["cat.jpg"]), k=5)
    print(run.keys()[rows])  # the five training images nearest to cat.jpg
    ```
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instdisc.evaluation.open_run import Run

__all__ = ["__version__", "open_run"]


def _version() -> str:
    try:
        return metadata.version("instdisc")
    except metadata.PackageNotFoundError:  # a checkout on the path, never installed
        project = Path(__file__).parents[1] / "pyproject.toml"
        version: str = tomllib.loads(project.read_text())["project"]["version"]
        return version


__version__ = _version()


def open_run(source: str | Path) -> Run:
    """Open the newest snapshot of a run, a snapshot by itself, or an index, to read and search it in this process.

    Args:
        source: A run directory, a directory of snapshots, one snapshot or an index; all but the first may be fsspec
            URLs, such as `s3://bucket/run`.

    Returns:
        The run; see `instdisc.evaluation.open_run.Run`.

    Raises:
        ClusterError: There is neither, or it cannot be read. Its subclass `SnapshotError` says which.

    Example:
        ```python
        run = instdisc.open_run("runs/sample")
        run.embeddings().shape  # (5000, 128)
        ```
    """
    # Every program imports this file, and torch takes seconds to import.
    from instdisc.evaluation.open_run import Run

    return Run(source)
