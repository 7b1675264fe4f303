"""Comparisons from the command line to the table, the files and the page."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from instdisc.compare import main, parse
from instdisc.comparison import points, runs
from instdisc.comparison.report import Group, table
from instdisc.train import parse as parse_training
from tests.instdisc.program import SMALL, summary_of, write_pictures

SEEDS = ["--vary", "training.seed=0,1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 32, classes=2)


def options(images: Path) -> list[str]:
    return [*SMALL, "--data.path", str(images), "--data.test-path", "None", "--knn.every", "1"]


def test_points_are_trained_once_and_compared(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--run-dir", str(tmp_path)]
    command = ["sample", *SEEDS, "--vary", "training.batch-size=8,400", *place, *options(images)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Not finished" in printed
    assert "fewer than one batch of 400" in printed
    names = [f"seed={seed},batch-size=8" for seed in (0, 1)]
    summaries = [summary_of(tmp_path / "points" / name) for name in names]
    found: dict[str, Any] = json.loads((tmp_path / "compare.json").read_text())
    assert [run["error"] is None for run in found["runs"]] == [True, False, True, False]
    best = found["groups"][0]
    assert (best["name"], best["runs"]) == ("training.batch-size 8", 2)
    for figure in ("knn_top1", "knn_top1_bank", "loss"):
        values = [summary[figure] for summary in summaries]
        assert best[figure]["mean"] == pytest.approx(statistics.fmean(values))
        assert best[figure]["deviation"] == pytest.approx(statistics.stdev(values))
    recalls = [summary["label_free"]["instance_recall_1"]["trained"] for summary in summaries]
    assert best["instance_recall_1"]["mean"] == pytest.approx(statistics.fmean(recalls))
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [run["name"] for run in found["runs"]]
    assert float(rows[0]["knn_top1"]) == summaries[0]["knn_top1"]
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 5  # accuracy and recall, over epochs and seconds, and the bars
    assert "fewer than one batch of 400" in page

    # Taken up again with another point: the finished ones are not trained again.
    written = [(tmp_path / "points" / name / "metrics.jsonl").read_bytes() for name in names]
    assert (
        main(["sample", "--vary", "training.seed=0,1,2", "--vary", "training.batch-size=8", *command[5:]])
        == 0
    )
    assert [(tmp_path / "points" / name / "metrics.jsonl").read_bytes() for name in names] == written
    again = json.loads((tmp_path / "compare.json").read_text())
    assert [run["name"] for run in again["runs"]] == [*names, "seed=2,batch-size=8"]

    # The same runs, as they lie there.
    assert main(["--report", str(tmp_path), "--run-dir", str(tmp_path / "report")]) == 0
    reported = json.loads((tmp_path / "report" / "compare.json").read_text())
    (group,) = reported["groups"]
    assert (group["runs"], group["knn_top1"]) == (3, again["groups"][0]["knn_top1"])


def test_recipes_are_compared(images: Path, tmp_path: Path) -> None:
    config = points.CompareConfig(
        vary=("objective.temperature=0.1,0.2",), recipes="cifar10-softmax", run_dir=tmp_path
    )
    found = points.plan_points("sample", config, options(images), parse_training)
    assert [point.name for point in found] == [
        "sample,temperature=0.1",
        "sample,temperature=0.2",
        "cifar10-softmax,temperature=0.1",
        "cifar10-softmax,temperature=0.2",
    ]
    assert [point.config.objective.temperature for point in found] == [0.1, 0.2, 0.1, 0.2]
    assert {point.config.objective.name for point in found} == {"spreading", "softmax"}


def test_values_of_several_numbers_and_settings_of_one_name(tmp_path: Path) -> None:
    vary = ("augmentation.crop-scale=0.2 1,0.5 1", "knn.k=5", "training.epochs=2", "knn.temperature=0.1")
    config = points.CompareConfig(vary=(*vary, "objective.temperature=0.2"), run_dir=tmp_path)
    found = points.plan_points("sample", config, [], parse_training)
    assert [point.config.augmentation.crop_scale for point in found] == [(0.2, 1.0), (0.5, 1.0)]
    assert found[0].name == ("crop-scale=0.2_1,k=5,epochs=2,knn.temperature=0.1,objective.temperature=0.2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--vary", "training.sed=0,1"], "--training.sed"),
        (["sample", "--vary", "training.seed=0,one"], "'one'"),
        (["sample", "--vary", "objective.temperature=0.1,-2"], "temperature is -2"),
        (["sample", "--vary", "training.seed"], "expected NAME=VALUE,VALUE"),
        (["sample", "--vary", "training.seed=0,,1"], "expected NAME=VALUE,VALUE"),
        (["sample", "--vary", "training.seed=0", "--vary", "training.seed=1"], "varied twice"),
        (["sample", "--recipes", "sampel"], "unknown recipe 'sampel'"),
        (["sampel", *SEEDS], "unknown recipe 'sampel'"),
        (["sample", *SEEDS, "--no-such-option"], "--no-such-option"),
        (["sample", "--report", "runs"], "--report"),
        ([], "nothing to compare"),
        (["--report", "no/such/runs"], "no/such/runs holds neither"),
    ],
)
def test_mistakes_are_named_before_the_first_run(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_of_training_pass_through() -> None:
    recipe, config, rest = parse(
        ["sample", "--knn.k", "5", *SEEDS, "--knn.no-baselines", "--run-dir", "here", "--x=-1"]
    )
    assert (recipe, config.vary, config.run_dir) == ("sample", ("training.seed=0,1",), Path("here"))
    assert rest == ["--knn.k", "5", "--knn.no-baselines", "--x=-1"]


def test_nothing_finished_is_a_failure(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--vary", "training.batch-size=400", "--run-dir", str(tmp_path), *options(images)]
    assert main(command) == 1
    assert "batch-size=400: " in capsys.readouterr().out


def test_figures_of_one_run_have_no_deviation() -> None:
    result = runs.Outcome(
        name="one",
        recipe="sample",
        varied={},
        path=Path("one"),
        summary={"knn_top1": 0.5, "loss": 2.25},
        lines=[],
    )
    assert table([Group("one", [result])]).rows == [["one", "1", "50.0%", "2.25"]]
