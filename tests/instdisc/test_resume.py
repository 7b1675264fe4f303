"""A run that is interrupted goes on as if it had not been, on the same or another number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.launch import Worker
from cluster.snapshots import Snapshot, newest_step
from cluster.stopping import Stopped
from instdisc.checkpoint import Checkpoints
from instdisc.config import RunConfig
from instdisc.errors import ConfigError
from instdisc.run_directory import RunDirectory
from instdisc.train import parse
from instdisc.trainer import Trainer
from instdisc.worker import train_on_worker
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.manifest import Manifest
from tests.instdisc.program import Run, refused, write_pictures
from tests.processes import run_ranks
from tests.ray_cluster import CHECKOUT, wait_until

TIMINGS = ("images_per_second", "loader_wait_fraction")
# 3 steps of 12 images in an epoch of 40.
OPTIONS = ["--training.epochs", "3", "--training.batch-size", "12", "--training.log-every", "1"]
OPTIONS += ["--backbone.embedding-dim", "16", "--probe.every", "1", "--probe.neighbours", "5"]
OPTIONS += [
    "--num-workers",
    "0",
    "--metrics.port",
    "0",
    "--snapshots.every-steps",
    "2",
    "--snapshots.keep",
    "9",
]
RECIPES = ("sample", "cifar10-parametric")


class StopAfter:
    """Asks for a stop in a certain step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> str | None:
        self.left -= 1
        return "the test" if self.left <= 0 else None


def configured(recipe: str, images: Path, run_dir: Path) -> RunConfig:
    small = ["--backbone.name", "resnet8", "--augmentation.image-size", "16", "--data.test-path", "None"]
    return parse([recipe, *OPTIONS, *small, "--data.path", str(images), "--run-dir", str(run_dir)])[1]


def prepared(recipe: str, images: Path, run_dir: Path) -> RunDirectory:
    run, config = RunDirectory(run_dir), configured(recipe, images, run_dir)
    manifest = build_manifest(resolve(str(images), root=run_dir, download=False))
    run.prepare(recipe, config, manifest, None)
    return run


def worker_of(rank: int, world_size: int, stop_after: int = 1 << 30) -> Worker:
    device = torch.device("cpu")
    return Worker(rank, world_size, rank, world_size, 0, device, stop_watch=StopAfter(stop_after))


def train(rank: int, world_size: int, recipe: str, images: Path, run_dir: Path, stop_after: int) -> Any:
    torch.set_num_threads(1)
    job = (recipe, configured(recipe, images, run_dir), RunDirectory(run_dir))
    return train_on_worker(worker_of(rank, world_size, stop_after), job)


def content(snapshot: Snapshot) -> dict[str, Any]:
    tables = {name: snapshot.read(name).tolist() for name in snapshot.tables}
    files = {name: snapshot.read_file(name) for name in snapshot.files}
    noted = {name: value for name, value in snapshot.attributes.items() if name != "train_seconds"}
    return tables | files | noted


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    """What was measured, without times and messages."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in TIMINGS}
        for row in rows
        if row["kind"] != "status"
    ]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, recipe: str, world_size: int) -> None:
    images = write_pictures(tmp_path / "images", 40, classes=4)
    whole, parts = (prepared(recipe, images, tmp_path / name) for name in ("whole", "parts"))
    run_ranks(world_size, train, recipe, images, whole.path, 1 << 30)
    for stop_after, done in ((1, 1), (4, 5)):
        first, *_ = run_ranks(world_size, train, recipe, images, parts.path, stop_after)
        assert first == Stopped("the test", f"step {done} of 9")
    summary, *_ = run_ranks(world_size, train, recipe, images, parts.path, 1 << 30)
    assert summary["steps"] == 9
    assert content(parts.open_snapshot()) == content(whole.open_snapshot())
    assert lines(parts) == lines(whole)
    assert summary["knn_top1_raw_pixels"] is not None


def restored(rank: int, world_size: int, recipe: str, images: Path, run_dir: Path) -> dict[str, Any]:
    config, run = configured(recipe, images, run_dir), RunDirectory(run_dir)
    manifest = Manifest.load(run.manifest)
    trainer = Trainer(worker_of(rank, world_size), config, len(manifest))
    checkpoints = Checkpoints(trainer, manifest, config, run.snapshots)
    checkpoints.restore()
    checkpoints.abandon()
    return {"embeddings": trainer.bank.rows, **trainer.objective.tables()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_moves_to_another_number_of_ranks(tmp_path: Path, recipe: str) -> None:
    images = write_pictures(tmp_path / "images", 40)
    run = prepared(recipe, images, tmp_path / "run")
    for world_size, stop_after, done, following in ((2, 4, 4, 3), (3, 1, 5, 1)):
        first, *_ = run_ranks(world_size, train, recipe, images, run.path, stop_after)
        assert first == Stopped("the test", f"step {done} of 9")
        snapshot = run.open_snapshot()
        ranks = run_ranks(following, restored, recipe, images, run.path)
        for name in ranks[0]:
            rows = torch.cat([rank[name] for rank in ranks])
            np.testing.assert_array_equal(rows.numpy(), snapshot.read(name))
    (summary,) = run_ranks(1, train, recipe, images, run.path, 1 << 30)
    assert (summary["steps"], summary["world_size"]) == (9, 1)
    steps = [row["step"] for row in lines(run) if row["kind"] == "train"]
    assert steps == list(range(1, 10))


def test_an_image_is_seen_once_in_an_epoch_though_the_number_of_ranks_changes(tmp_path: Path) -> None:
    """With momentum 0 a row becomes its embedding; a row that no step of the epoch met keeps its first value."""
    images = write_pictures(tmp_path / "images", 40)
    run = prepared("sample", images, tmp_path / "run")
    seen: list[set[int]] = []
    before = restored_rows(run, images)
    for world_size in (2, 3, 1):
        run_ranks(world_size, train, "sample", images, run.path, 1)
        after = run.open_snapshot().read("embeddings")
        seen.append(set(np.flatnonzero((after != before).any(axis=1)).tolist()))
        before = after
    assert [len(rows) for rows in seen] == [12, 12, 12]
    assert len(set.union(*seen)) == 36


def restored_rows(run: RunDirectory, images: Path) -> Any:
    config = configured("sample", images, run.path)
    return Trainer(worker_of(0, 1), config, 40).bank.rows.numpy().copy()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    images = write_pictures(tmp_path / "images", 40, classes=4)
    command = [sys.executable, "-m", "instdisc.train", "sample", *OPTIONS, "--training.epochs", "300"]
    command += ["--data.path", str(images), "--data.test-path", "None", "--run-dir", str(tmp_path / "run")]
    run = RunDirectory(tmp_path / "run")
    program = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: run.metrics.exists() and '"step": 7,' in run.metrics.read_text(), timeout_s=120)
    program.send_signal(number)
    _, said = program.communicate(timeout=120)
    assert program.returncode == 130, said
    assert f"stopped by {number.name} at step" in said
    assert "Traceback" not in said
    step = newest_step(run.snapshots)
    assert step is not None
    assert step >= 7
    program = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: f'"step": {step + 3},' in run.metrics.read_text(), timeout_s=120)
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    messages = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert {
        "kind": "status",
        "message": f"going on from the snapshot of step {step}, 1 worker(s)",
    } in messages


def test_snapshots_of_another_run_are_refused(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40)
    recipe, there = "sample", prepared("sample", images, tmp_path / "there")
    run_ranks(1, train, recipe, images, there.path, 2)
    others = write_pictures(tmp_path / "others", 41)
    here = prepared(recipe, others, tmp_path / "here")
    here.begin()
    there.snapshots.rename(here.snapshots)
    with pytest.raises(ConfigError, match="num instances is 40, this run's is 41"):
        train(0, 1, recipe, others, here.path, 1)


def test_a_checkpoint_that_is_a_pickle_is_never_unpickled(run: Run, tmp_path: Path) -> None:
    """A hostile file with a valid checksum in the place of the network: refused by its format."""
    from cluster.partition import Partition
    from cluster.snapshot_writer import SnapshotWriter

    status, said, out = run(write_pictures(tmp_path / "images", 40))
    assert status == 0, said
    there = RunDirectory(out)
    newest = there.open_snapshot()
    hostile = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "owned").encode()
    writer = SnapshotWriter(there.snapshots, Partition(40, 1), 0, "hostile")
    tables = {name: newest.read(name) for name in newest.tables}
    files = dict.fromkeys(newest.files, hostile)
    writer.save(newest.step + 1, tables, files, newest.attributes)
    writer.close()
    there.summary.unlink()
    refused(run(tmp_path / "images"), "network.safetensors")
    assert not (tmp_path / "owned").exists()
