"""The runs of a comparison: which there are, and training those that are not finished."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, SnapshotError
from cluster.launch import connected
from instdisc.common.errors import ConfigError, NonFiniteError
from instdisc.common.files import read_lines
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.compare import CompareConfig
from instdisc.settings.run import RunConfig
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

_FAILURES = (ConfigError, DataError, NonFiniteError, SnapshotError, ClusterError, OSError)
SEED = "training.seed"

Parse = Callable[[Sequence[str]], tuple[str, RunConfig]]
"""How training reads its command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run to be compared.

    Attributes:
        name: Of its directory.
        recipe: Its recipe.
        varied: The settings in which the runs differ, by name, as typed.
        config: All of its settings.
    """

    name: str
    recipe: str
    varied: dict[str, str]
    config: RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
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


def plan_points(recipe: str, config: CompareConfig, options: Sequence[str], parse: Parse) -> list[Point]:
    """All combinations, every one of them parsed.

    Args:
        recipe: The first recipe.
        config: What is varied.
        options: Of training, the same for all.
        parse: Reads recipe and options.

    Raises:
        ConfigError: A setting that is no NAME=VALUES, is varied twice, is unknown, or a value that cannot be.
    """
    varied = dict(_values(text) for text in config.vary)
    if len(varied) < len(config.vary):
        raise ConfigError("a setting is varied twice: give all of its values in one --vary")
    short = {name: name.rpartition(".")[2] for name in varied}
    names = {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in varied}
    recipes = list(
        dict.fromkeys([recipe, *(each.strip() for each in config.recipes.split(",") if each.strip())])
    )
    points = []
    for each, values in itertools.product(recipes, itertools.product(*varied.values())):
        chosen = dict(zip(varied, values, strict=True))
        parts = [each] if len(recipes) > 1 or not chosen else []
        parts += [f"{names[name]}={value}" for name, value in chosen.items()]
        name = re.sub(r"[^\w=.,+-]+", "_", ",".join(parts))
        typed = [word for setting, value in chosen.items() for word in (f"--{setting}", *value.split())]
        place = ["--run-dir", str(config.run_dir / "points" / name)]
        parsed = _parsed([each, *options, *typed, *place], parse)
        points.append(Point(name=name, recipe=each, varied=chosen, config=parsed))
    return points


def _values(text: str) -> tuple[str, list[str]]:
    name, given, values = text.partition("=")
    found = [value.strip() for value in values.split(",")]
    if not given or not name.strip() or not all(found):
        raise ConfigError(f"--vary {text!r}: expected NAME=VALUE,VALUE, such as training.seed=0,1,2")
    return name.strip().removeprefix("--"), list(dict.fromkeys(found))


def _parsed(arguments: list[str], parse: Parse) -> RunConfig:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse(arguments)[1]
        except SystemExit as ended:
            status = ended.code
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.getvalue()).split())
    raise ConfigError(f"{' '.join(arguments)}: {words or f'status {status}'}")


def train_points(points: Sequence[Point]) -> Iterator[Result]:
    """Train one run after the other; one that fails is a result with its reason.

    Raises:
        RunStopped: Ctrl-C or SIGTERM came; what was done is saved.
        KeyboardInterrupt: The same, before everything was saved.
    """
    from instdisc.training.start import train  # takes seconds to import

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
            yield _result(run, point.name, point.recipe, point.varied, error)


def stored_results(directories: Sequence[Path]) -> list[Result]:
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
        _result(
            run, path.name, run.stored_config()[0], {name: each.get(name, "–") for name in differing}, None
        )
        for run, path, each in zip(runs, paths, settings, strict=True)
    ]


def _result(run: RunDirectory, name: str, recipe: str, varied: dict[str, str], error: str | None) -> Result:
    summary = run.read_summary() if run.holds_run() else None
    lines = read_lines(run.journal) if run.journal.exists() else []
    if summary is None and error is None:
        error = "not finished"
    return Result(
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
