"""A run is made longer by the same command with more epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instdisc.inspect import main as inspect
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.training.optim import learning_rate
from tests.instdisc.program import Run, measured, refused, snapshot_content, summary_of, write_pictures

CONSTANT = ["--optimizer.schedule", "steps", "--optimizer.milestones", "9", "--knn.every", "1"]
COSINE = OptimizerConfig(learning_rate=0.06, schedule="cosine")


def epochs(number: int) -> list[str]:
    return ["--training.epochs", str(number), "--training.log-every", "1"]


def test_a_finished_run_that_is_made_longer_ends_as_one_of_that_length(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 24, classes=3)
    assert run(images, *CONSTANT, *epochs(3))[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    for number in (1, 3):
        status, said, out = run(images, *CONSTANT, *epochs(number))
        assert status == 0, said
    assert snapshot_content(RunDirectory(out)) == snapshot_content(RunDirectory(tmp_path / "whole"))
    longer, whole = (
        [{name: value for name, value in line.items() if name != "total_steps"} for line in measured(each)]
        for each in (RunDirectory(out), RunDirectory(tmp_path / "whole"))
    )
    assert longer == whole
    assert summary_of(out)["epochs"] == 3
    assert RunDirectory(out).stored_config()[1].training.epochs == 3
    status, said, _ = run(images, *CONSTANT, *epochs(3))
    assert status == 0, said
    assert "is complete" in said


def test_the_rate_follows_the_new_length_from_the_epoch_reached(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_pictures(tmp_path / "images", 24)
    assert run(images, *epochs(2))[0] == 0
    with caplog.at_level("INFO"):
        status, said, out = run(images, *epochs(4))
    assert status == 0, said
    assert "4 epochs instead of 2: from epoch 2 on the learning rate is 0.03 instead of 0" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    lengths = [2] * 6 + [4] * 6
    assert rates == [learning_rate(COSINE, step / 3, length) for step, length in enumerate(lengths)]


def test_an_unfinished_run_may_be_made_shorter_but_not_than_it_is(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_pictures(tmp_path / "images", 24)
    assert run(images, *epochs(2))[0] == 0
    refused(run(images, *epochs(1)), "has done 2 epochs", "give at least 2", "--overwrite")
    run_directory = RunDirectory(tmp_path / "out")
    run_directory.store_epochs(9)  # as where a longer run has been interrupted
    assert run_directory.read_summary() is None
    assert inspect([str(run_directory.path)]) == 0
    assert "not complete" in capfd.readouterr().out
    status, said, out = run(images, *epochs(3))
    assert status == 0, said
    assert run_directory.settings()["training"]["epochs"] == summary_of(out)["epochs"] == 3
