"""What a comparison finds: a table over seeds, the same as JSON and CSV, and a page with curves."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instdisc.common.files import write_json, write_text
from instdisc.comparison.runs import Outcome
from instdisc.evaluation.page import Chart, Page, Table, render
from instdisc.evaluation.plots import COLORS, Series, axis_over, bar_chart, line_chart

FIGURES = {
    "knn_top1_readout": "kNN top-1, read out",
    "knn_top1": "kNN top-1, plain",
    "knn_top1_whitened": "kNN top-1, whitened",
    "knn_top1_features": "kNN top-1, features",
    "knn_top1_bank": "kNN top-1, bank",
    "instance_recall_1": "instance recall",
    "loss": "loss",
    "train_seconds": "seconds",
    "images_per_second": "images/s",
}
"""Figures of a run's summary in the order of the columns."""
_SHARES = ("knn", "instance")
_CURVES = {
    "knn": ("knn_top1_recomputed", "kNN top-1"),
    "label_free": ("instance_recall_1", "instance recall"),
}


class Group(NamedTuple):
    """Runs that differ in their seeds alone."""

    name: str
    """The settings in which it differs from other groups."""
    outcomes: list[Outcome]

    def values(self, figure: str) -> list[float]:
        """Of the finished runs that have the figure."""
        found = (_figure(outcome, figure) for outcome in self.outcomes)
        return [value for value in found if value is not None]


def groups_of(outcomes: Sequence[Outcome]) -> list[Group]:
    """The groups, the one with the best accuracy first; without labels by instance recall."""
    found: dict[Any, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.group, []).append(outcome)
    several = len({outcome.recipe for outcome in outcomes}) > 1
    groups = []
    for (recipe, settings), members in found.items():
        parts = [recipe] if several or not settings else []
        groups.append(Group(", ".join([*parts, *(f"{name} {value}" for name, value in settings)]), members))
    ranked = ranking(groups)
    return sorted(groups, key=lambda group: -_mean(group.values(ranked)) if group.values(ranked) else 1.0)


def ranking(groups: Sequence[Group]) -> str:
    """The figure by which groups are ordered."""
    return next((name for name in FIGURES if any(group.values(name) for group in groups)), "knn_top1_readout")


def table(groups: Sequence[Group]) -> Table:
    """Mean and, of several seeds, standard deviation of every figure; failed runs with their reasons."""
    shown = [name for name in FIGURES if any(group.values(name) for group in groups)]
    rows = [
        [group.name, str(len(group.outcomes)), *(_spread(name, group.values(name)) for name in shown)]
        for group in groups
    ]
    note = "Mean ± standard deviation over the seeds of the runs that finished."
    return Table("Results", ["", "runs", *(FIGURES[name] for name in shown)], rows, note)


def failures(outcomes: Sequence[Outcome]) -> Table | None:
    """Runs that did not finish, and why."""
    rows = [(outcome.name, outcome.error) for outcome in outcomes if outcome.error is not None]
    return Table("Not finished", ("run", "reason"), rows) if rows else None


def as_text(found: Table) -> str:
    """A table for a terminal."""
    rows = [found.columns, *found.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}", *map("{:>{}}".format, row[1:], widths[1:])]) for row in rows
    )


def write(directory: Path, title: str, outcomes: Sequence[Outcome]) -> Path:
    """Write `compare.json`, `compare.csv` and `index.html`; the path of the page."""
    groups, failed = groups_of(outcomes), failures(outcomes)
    directory.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.varied))
    records = [
        {
            "name": outcome.name,
            "recipe": outcome.recipe,
            **{name: outcome.varied.get(name) for name in names},
            **{name: _figure(outcome, name) for name in FIGURES},
            "error": outcome.error,
            "run_dir": str(outcome.path),
        }
        for outcome in outcomes
    ]
    spreads = [
        {
            "name": group.name,
            "runs": len(group.outcomes),
            **{
                name: {"mean": _mean(values), "deviation": _deviation(values)}
                for name in FIGURES
                if (values := group.values(name))
            },
        }
        for group in groups
    ]
    write_json(directory / "compare.json", {"runs": records, "groups": spreads})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(directory / "compare.csv", text.getvalue())
    page = Page(
        title=title,
        subtitle=f"{len(outcomes)} runs, {sum(outcome.error is None for outcome in outcomes)} finished",
        tiles=_tiles(groups),
        charts=_charts(groups),
        tables=[table(groups), *([failed] if failed else [])],
        galleries=[],
        footer="The figures are also in compare.json and compare.csv beside this page.",
    )
    write_text(directory / "index.html", render(page))
    return directory / "index.html"


def _tiles(groups: Sequence[Group]) -> list[tuple[str, str]]:
    name = ranking(groups)
    if not groups or not groups[0].values(name):
        return []
    return [
        (f"best {FIGURES[name]}", _spread(name, groups[0].values(name))),
        ("with", groups[0].name),
    ]


def _charts(groups: Sequence[Group]) -> list[Chart]:
    """Curves over epochs and over seconds, and bars of the groups."""
    charts = []
    note = f"Mean over the seeds{'' if len(groups) <= COLORS else f'; the best {COLORS} of {len(groups)}'}."
    for kind, (key, name) in _CURVES.items():
        for axis, unit in (("epoch", "epochs"), ("train_seconds", "seconds of training")):
            lines = [
                Series(group.name, *curve, marks=True)
                for group in groups[:COLORS]
                if (curve := _curve(group, kind, key, axis))
            ]
            if lines:
                across = axis_over(unit, [0, *(x for line in lines for x in line.x)], tight=True)
                upwards = axis_over(name, [y for line in lines for y in line.y], percent=True)
                svg = line_chart(name, lines, across, upwards)
                charts.append(Chart(f"{name} over {unit}", [line.name for line in lines], svg, note))
    ranked = ranking(groups)
    bars = [
        (group.name, _mean(values), _deviation(values))
        for group in groups
        if (values := group.values(ranked))
    ]
    if bars:
        svg = bar_chart(FIGURES[ranked], bars, percent=ranked.startswith(_SHARES))
        whiskers = "Whiskers: standard deviation over the seeds."
        charts.append(Chart(f"{FIGURES[ranked]} at the end", [], svg, whiskers))
    return charts


def _curve(group: Group, kind: str, key: str, axis: str) -> tuple[list[float], list[float]] | None:
    """Mean over the seeds after every epoch that all finished runs measured."""
    runs = [
        points
        for outcome in group.outcomes
        if outcome.error is None and (points := _points(outcome, kind, key, axis))
    ]
    epochs = sorted(set.intersection(*map(set, runs))) if runs else []
    if not epochs:
        return None
    xs, ys = ([_mean([points[epoch][place] for points in runs]) for epoch in epochs] for place in (0, 1))
    return xs, ys


def _points(outcome: Outcome, kind: str, key: str, axis: str) -> dict[float, tuple[float, float]]:
    """By epoch what a run measured, with the place on the axis; runs of earlier releases noted no seconds."""
    return {
        line["epoch"]: (line[axis], line[key])
        for line in outcome.lines
        if line.get("kind") == kind
        and line.get("of", "trained") == "trained"
        and line.get(key) is not None
        and axis in line
    }


def _figure(outcome: Outcome, name: str) -> float | None:
    if outcome.summary is None:
        return None
    if name == "instance_recall_1":
        label_free = outcome.summary.get("label_free") or {}  # earlier releases measured none
        value: float | None = label_free.get(name, {}).get("trained")
    else:
        value = outcome.summary.get(name)
    return value


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    share = name.startswith(_SHARES)
    scale, digits = (100, 1) if share else (1, 0 if _mean(values) >= 100 else 2)
    deviation = _deviation(values)
    text = f"{scale * _mean(values):,.{digits}f}"
    return (
        text + ("" if deviation is None else f" ± {scale * deviation:,.{digits}f}") + ("%" if share else "")
    )
