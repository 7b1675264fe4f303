"""Training the runs of a comparison that are not finished, and reading those that are."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, SnapshotError
from cluster.launch import connected
from instdisc.common.errors import ConfigError, NonFiniteError
from instdisc.common.files import read_lines
from instdisc.comparison.points import Point
from instdisc.runs.run_directory import RunDirectory
from instdisc.training.start import train
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

_FAILURES = (ConfigError, DataError, NonFiniteError, SnapshotError, ClusterError, OSError)
SEED = "training.seed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run.

    Attributes:
        name: Of the run.
        recipe: Its recipe.
        varied: The settings in which the runs differ, by name.
        path: The run directory.
        summary: Its `summary.json`; None if it is not finished.
        lines: Of its `metrics.jsonl`.
        error: Why it is not finished, if that is known.
    """

    name: str
    recipe: str
    varied: dict[str, str]
    path: Path
    summary: dict[str, Any] | None
    lines: list[dict[str, Any]]
    error: str | None = None

    @property
    def group(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What runs have in common that differ in their seeds alone."""
        return self.recipe, tuple((name, value) for name, value in self.varied.items() if name != SEED)


def train_points(points: Sequence[Point]) -> Iterator[Outcome]:
    """Train one run after the other; one that fails is a result with its reason.

    Raises:
        RunStopped: Ctrl-C or SIGTERM came; what was done is saved.
        KeyboardInterrupt: The same, before everything was saved.
    """
    # One cluster for all of them, where none is running.
    with connected(points[0].config.launch):
        for number, point in enumerate(points, 1):
            logger.info("\n%d of %d: %s", number, len(points), point.name)
            assert point.config.run_dir is not None
            run, error = RunDirectory(point.config.run_dir), None
            try:
                train(point.recipe, point.config, run)
            except _FAILURES as failure:
                error = " ".join(str(failure).split())
                logger.warning("%s failed: %s", point.name, error)
            yield _outcome(run, point.name, point.recipe, point.varied, error)


def stored_outcomes(directories: Sequence[Path]) -> list[Outcome]:
    """Runs that exist already, told apart by the settings in which they differ.

    Args:
        directories: Of runs, or of comparisons.

    Raises:
        ConfigError: One of them is neither.
    """
    paths: list[Path] = []
    for directory in directories:
        points = sorted(
            path for path in (directory / "points").glob("*") if RunDirectory(path).config.exists()
        )
        if not points and not RunDirectory(directory).config.exists():
            raise ConfigError(f"{directory} holds neither a run nor a comparison: name the directory of one")
        paths += points or [directory]
    runs = [RunDirectory(path) for path in paths]
    settings = [_flat(run.stored_config()[1].settings()) for run in runs]
    ignored = ("run-dir", "overwrite", "snapshots.", "metrics.", "launch.", "loader.")
    differing = [
        name
        for name in dict.fromkeys(itertools.chain.from_iterable(settings))
        if not name.startswith(ignored) and len({each.get(name, "–") for each in settings}) > 1
    ]
    return [
        _outcome(
            run, path.name, run.stored_config()[0], {name: each.get(name, "–") for name in differing}, None
        )
        for run, path, each in zip(runs, paths, settings, strict=True)
    ]


def _outcome(run: RunDirectory, name: str, recipe: str, varied: dict[str, str], error: str | None) -> Outcome:
    summary = run.read_summary() if run.holds_run() else None
    lines = read_lines(run.journal) if run.journal.exists() else []
    if summary is None and error is None:
        error = "not finished"
    return Outcome(
        name=name,
        recipe=recipe,
        varied=varied,
        path=run.path,
        summary=None if error else summary,
        lines=lines,
        error=error,
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by the names that options have."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        full = f"{prefix}{name.replace('_', '-')}"
        found |= _flat(value, f"{full}.") if isinstance(value, dict) else {full: str(value)}
    return found
