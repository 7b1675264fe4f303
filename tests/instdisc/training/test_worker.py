"""What a rank tells Prometheus of how it began and how it ended."""

from __future__ import annotations

import dataclasses
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cluster.errors import SnapshotError
from cluster.group import Worker
from cluster.snapshots import newest_step
from cluster.stopping import Stopped
from instdisc.common.files import append_line, read_lines
from instdisc.runs.run_directory import RunDirectory
from instdisc.train import parse
from instdisc.training.worker import Job, train_on_worker
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.errors import DataError
from tests.instdisc.program import SMALL, bank_of, write_pictures
from tests.ray_cluster import free_port, wait_until


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A prepared run of 10 steps."""
    return prepare(tmp_path, classes=0)


def prepare(tmp_path: Path, classes: int, *more: str, count: int = 40) -> Job:
    images = write_pictures(tmp_path / "images", count, classes)
    options = [
        *SMALL,
        "--data.path",
        str(images),
        "--data.test-path",
        "None",
        "--metrics.port",
        str(free_port()),
        *more,
    ]
    recipe, config = parse(["sample", *options])
    run = RunDirectory(tmp_path / "run")
    run.prepare(recipe, config, build_manifest(resolve(str(images), root=tmp_path, download=False)), None)
    return recipe, config, run


def exported(job: Job, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{job[1].metrics.port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"instdisc_{name}{{")).rpartition(" ")[2])


def once_trained(run: RunDirectory) -> Callable[[], str | None]:
    """Asks to stop after the first step."""
    return lambda: "the test" if any(row["kind"] == "train" for row in read_lines(run.journal)) else None


def worker(losses: int, in_every_step: Callable[[], str | None]) -> Worker:
    return Worker(0, 1, 0, 1, 0, torch.device("cpu"), restarts=losses, stop_watch=in_every_step)


def test_restarts_are_losses_and_not_every_new_start(job: Job) -> None:
    seen: list[float] = []

    def stop() -> str:
        seen.append(exported(job, "restarts_total"))
        return "the test"

    for losses in (0, 0, 2, 2):
        assert isinstance(train_on_worker(worker(losses, stop), job), Stopped)
    assert seen == [0, 0, 2, 2]


def test_a_run_whose_snapshots_take_longer_than_a_stop_may_says_so_at_its_start(job: Job) -> None:
    run = job[2]
    short = dataclasses.replace(worker(0, once_trained(run)), grace_s=1e-6)
    assert isinstance(train_on_worker(short, job), Stopped)
    seconds = run.open_snapshot().seconds
    assert seconds is not None
    run.journal.write_text("")
    assert isinstance(train_on_worker(short, job), Stopped)
    first = read_lines(run.journal)[0]["message"]
    assert f"a snapshot takes {seconds:.0f} s and a stop up to twice that" in first
    assert "else up to 1000 steps are lost" in first


@pytest.mark.parametrize("when", ["in a step", "in the last measurement"])
def test_prometheus_sees_that_a_run_was_stopped_on_purpose(tmp_path: Path, when: str) -> None:
    """It is scraped after the stop, whose snapshot is committed by then."""
    in_step = when == "in a step"
    job = prepare(tmp_path, classes=0 if in_step else 2)  # without labels there is no measurement
    run = job[2]
    seen: list[tuple[float, int | None]] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.5):
            with suppress(OSError, StopIteration, SnapshotError):
                seen.append((exported(job, "stopping"), newest_step(run.snapshots)))

    def stop_once_scraped_twice() -> str | None:
        if once_trained(run)() is None or (not in_step and newest_step(run.snapshots) != 10):
            return None
        wait_until(lambda: len(seen) > 2, timeout_s=60)
        return "SIGTERM"

    reader = threading.Thread(target=scrape)
    reader.start()
    try:
        stopped = train_on_worker(worker(0, stop_once_scraped_twice), job)
    finally:
        ended.set()
        reader.join()
    assert isinstance(stopped, Stopped)
    assert seen[0][0] == 0
    assert seen[-1] == (1, newest_step(run.snapshots))
    assert stopped.progress == f"step {seen[-1][1]} of 10"
    assert (seen[-1][1] == 10) != in_step


def test_what_a_killed_run_has_lost_is_said(job: Job) -> None:
    run = job[2]
    assert run.what_is_kept() == "no step was done"
    train_on_worker(worker(0, once_trained(run)), job)
    saved = newest_step(run.snapshots)
    assert saved is not None
    assert run.what_is_kept() == f"the next run resumes from step {saved}"
    append_line(run.journal, {"kind": "train", "step": 30})
    said = f"the next run resumes from step {saved}; at least {30 - saved} steps after it are lost"
    assert run.what_is_kept() == said


@pytest.mark.slow
def test_that_the_last_snapshot_failed_is_read_before_the_end(job: Job) -> None:
    run = job[2]
    seen: list[float] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1):
            with suppress(OSError):
                seen.append(exported(job, "snapshot_failures_total"))

    def in_the_way() -> None:
        run.snapshots.mkdir(exist_ok=True)
        (run.snapshots / "step-000000010").write_text("in the way")
        time.sleep(0.4)

    reader = threading.Thread(target=scrape)
    reader.start()
    try:
        with pytest.raises(SnapshotError, match="the last snapshot could not be written"):
            train_on_worker(worker(0, in_the_way), job)
    finally:
        ended.set()
        reader.join()
    assert seen[-1] == 1


def test_images_that_cannot_be_read_any_more_cost_nothing_that_was_done(tmp_path: Path) -> None:
    """As when their storage goes away: the state is saved, and the run ends as if it had not been interrupted."""
    once = ["--training.epochs", "1"]  # of 30 steps, more than are loaded ahead; files once opened remain so
    whole = prepare(tmp_path / "whole", 0, *once, count=240)
    train_on_worker(worker(0, lambda: None), whole)
    job = prepare(tmp_path, 0, *once, count=240)
    run, images, away = job[2], tmp_path / "images", tmp_path / "away"

    def unmount() -> None:
        if not away.exists() and any(row["kind"] == "train" for row in read_lines(run.journal)):
            images.rename(away)

    with pytest.raises(DataError, match=r"images.*what was done is saved, and the same command") as ended:
        train_on_worker(worker(0, unmount), job)
    saved = newest_step(run.snapshots)
    assert saved is not None
    assert 1 <= saved < 30
    assert str(ended.value).endswith(f"step {saved}")
    away.rename(images)
    assert not isinstance(train_on_worker(worker(0, lambda: None), job), Stopped)
    assert (bank_of(run.path) == bank_of(whole[2].path)).all()
