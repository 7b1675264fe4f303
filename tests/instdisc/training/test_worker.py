"""What a rank tells Prometheus of how it began and how it ended."""

from __future__ import annotations

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
from cluster.stopping import Stopped
from instdisc.runs.run_directory import RunDirectory
from instdisc.train import parse
from instdisc.training.worker import Job, train_on_worker
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from tests.instdisc.program import SMALL, write_pictures
from tests.ray_cluster import free_port


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A prepared run of 10 steps."""
    images = write_pictures(tmp_path / "images", 40)
    options = [
        *SMALL,
        "--data.path",
        str(images),
        "--data.test-path",
        "None",
        "--metrics.port",
        str(free_port()),
    ]
    recipe, config = parse(["sample", *options])
    run = RunDirectory(tmp_path / "run")
    run.prepare(recipe, config, build_manifest(resolve(str(images), root=tmp_path, download=False)), None)
    return recipe, config, run


def exported(job: Job, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{job[1].metrics.port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"instdisc_{name}{{")).rpartition(" ")[2])


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
