"""What the progress bar prints of a metrics file that grows, is moved and is replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from instdisc.common.files import append_line
from instdisc.runs.run_directory import RunDirectory
from instdisc.training.progress import ProgressBar
from tests.ray_cluster import wait_until

STEPS_PER_EPOCH = 2


class Printed:
    """What was printed on standard error so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def text(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text, timeout_s=30)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def say(metrics: Path, message: str) -> None:
    append_line(metrics, {"kind": "status", "message": message})


def train(metrics: Path, step: int, total_steps: int = 10) -> None:
    row: dict[str, Any] = {"kind": "train", "step": step, "total_steps": total_steps, "loss": 1.0}
    append_line(metrics, row | {"epoch": step / STEPS_PER_EPOCH, "images_per_second": 100 * step})


def measured(metrics: Path, epoch: int, recomputed: float | None) -> None:
    append_line(metrics, {"kind": "knn", "epoch": epoch, "knn_top1_recomputed": recomputed})


def test_every_line_is_shown_once_though_the_file_moves_and_is_rewound(
    run: RunDirectory, printed: Printed
) -> None:
    first = run.path / "first.jsonl"
    first.touch()
    with ProgressBar(first, run.journal):
        say(first, "hello")
        first.rename(run.journal)
        measured(run.journal, 1, 0.25)
        measured(run.journal, 2, 0.5)
        printed.wait_for("epoch 2")
        for _ in range(2):
            run.rewind_journal(STEPS_PER_EPOCH, STEPS_PER_EPOCH)
            say(run.journal, "resuming from step 2")
        measured(run.journal, 2, 0.75)
    assert printed.text.splitlines() == [
        "hello",
        "epoch 1: kNN top-1 recomputed 25.0%",
        "epoch 2: kNN top-1 recomputed 50.0%",
        "resuming from step 2",
        "resuming from step 2",
        "epoch 2: kNN top-1 recomputed 75.0%",
    ]


def test_a_run_that_goes_on_does_not_show_its_history(run: RunDirectory, printed: Printed) -> None:
    say(run.journal, "long ago")
    train(run.journal, 2)
    with run.journal.open("a") as file:
        file.write('{"kind": "tra')  # by a process that was killed
    with ProgressBar(run.journal, run.journal):
        run.rewind_journal(STEPS_PER_EPOCH, STEPS_PER_EPOCH)
        say(run.journal, "resuming from step 2")
        train(run.journal, 3)
    shown = printed.text.splitlines()
    assert shown[0] == "resuming from step 2"
    assert shown[1].startswith("step 3/10, epoch 1.5, loss 1, 300 images/s")
    assert len(shown) == 2


def test_steps_that_are_done_again_count_from_there(run: RunDirectory, printed: Printed) -> None:
    run.journal.touch()
    with ProgressBar(run.journal, run.journal):
        train(run.journal, 8)
        printed.wait_for("step 8/10")
        run.rewind_journal(0, STEPS_PER_EPOCH)
        train(run.journal, 1)
        printed.wait_for("step 1/10")
        train(run.journal, 10)
    assert re.findall(r"step (\d+)/10, epoch .*, loss", printed.text) == ["8", "1", "10"]


def test_a_measurement_without_a_value(run: RunDirectory, printed: Printed) -> None:
    run.journal.touch()
    with ProgressBar(run.journal, run.journal):
        measured(run.journal, 1, None)
    assert printed.text == "epoch 1: kNN top-1 recomputed –\n"
