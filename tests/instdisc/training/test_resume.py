"""A run that is interrupted goes on as if it had not been, on the same or another number of ranks."""

from __future__ import annotations

import inspect
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.group import Worker
from cluster.snapshots import newest_step, owner_of, take_over
from cluster.stopping import Stopped
from instdisc.common.errors import ConfigError
from instdisc.common.files import read_lines
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.run import RunConfig
from instdisc.train import parse
from instdisc.training.saving import RunSnapshots
from instdisc.training.trainer import Trainer
from instdisc.training.worker import train_on_worker
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.manifest import Manifest
from tests.instdisc.program import Run, measured, refused, snapshot_content, write_pictures
from tests.processes import run_ranks
from tests.ray_cluster import killed_at_last, wait_until

# 3 steps of 12 images in an epoch of 40.
OPTIONS = ["--training.epochs", "3", "--training.batch-size", "12", "--training.log-every", "1"]
OPTIONS += ["--backbone.embedding-dim", "16", "--knn.every", "1", "--knn.k", "5"]
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
RECIPES = (
    "sample",
    "cifar10-parametric",
    "cifar10-npid",
)  # tables and numbers of an objective: none, some, log Z


class Killed(BaseException):
    """Nobody catches it."""


class StopAfter:
    """Asks for a stop in a certain step from here; what is asked during a measurement does not count."""

    def __init__(self, steps: int) -> None:
        self.steps, self.asked = steps, 0

    def __call__(self) -> str | None:
        if inspect.stack()[2].function == "until_stopped":
            return None
        self.asked += 1
        return "the test" if self.asked >= self.steps else None


class StopWhileMeasuring:
    """Asks for a stop while the accuracy after an epoch is measured, when this is asked for the second time."""

    def __init__(self, epoch: int, run: RunDirectory) -> None:
        self.step, self.run, self.asked = 3 * epoch, run, 0

    def __call__(self) -> str | None:
        self.asked += read_lines(self.run.journal)[-1].get("step") == self.step
        return "the test" if self.asked == 2 else None


def configured(recipe: str, images: Path, run_dir: Path) -> RunConfig:
    small = ["--backbone.name", "resnet8", "--augmentation.image-size", "16", "--data.test-path", "None"]
    return parse([recipe, *OPTIONS, *small, "--data.path", str(images), "--run-dir", str(run_dir)])[1]


def prepared(recipe: str, images: Path, run_dir: Path) -> RunDirectory:
    run, config = RunDirectory(run_dir), configured(recipe, images, run_dir)
    manifest = build_manifest(resolve(str(images), root=run_dir, download=False))
    run.prepare(recipe, config, manifest, None)
    return run


def worker_of(rank: int, world_size: int, stop_watch: Callable[[], str | None] = lambda: None) -> Worker:
    return Worker(rank, world_size, rank, world_size, 0, torch.device("cpu"), stop_watch=stop_watch)


def train(rank: int, world_size: int, recipe: str, images: Path, run_dir: Path, stop_after: int) -> Any:
    torch.set_num_threads(1)
    run = RunDirectory(run_dir)
    job = (recipe, configured(recipe, images, run_dir), run)
    return train_on_worker(worker_of(rank, world_size, StopAfter(stop_after)), job)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
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
    assert snapshot_content(parts) == snapshot_content(whole)
    assert measured(parts) == measured(whole)
    assert summary["knn_top1_raw_pixels"] is not None


def train_until_measuring(rank: int, world_size: int, images: Path, run_dir: Path, epoch: int) -> Any:
    torch.set_num_threads(1)
    run = RunDirectory(run_dir)
    watch = StopWhileMeasuring(epoch, run) if rank == world_size - 1 else lambda: None
    return train_on_worker(
        worker_of(rank, world_size, watch), ("sample", configured("sample", images, run_dir), run)
    )


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stop_ends_a_measurement_which_the_next_run_repeats(tmp_path: Path, epoch: int) -> None:
    images = write_pictures(tmp_path / "images", 40, classes=4)
    run = prepared("sample", images, tmp_path / "run")
    first, *_ = run_ranks(2, train_until_measuring, images, run.path, epoch)
    assert first == Stopped("another rank", f"step {3 * epoch} of 9")
    assert newest_step(run.snapshots) == 3 * epoch
    assert not run.has_accuracy(epoch)
    summary, *_ = run_ranks(2, train, "sample", images, run.path, 1 << 30)
    assert summary["steps"] == 9
    assert [row["epoch"] for row in measured(run) if row["kind"] == "knn"] == [1, 2, 3]


def restored(rank: int, world_size: int, recipe: str, images: Path, run_dir: Path) -> dict[str, Any]:
    config, run = configured(recipe, images, run_dir), RunDirectory(run_dir)
    manifest = Manifest.load(run.manifest)
    trainer = Trainer(worker_of(rank, world_size), config, len(manifest))
    checkpoints = RunSnapshots(trainer, manifest, config, run.snapshots, run.settings()["run_id"])
    checkpoints.restore()
    checkpoints.abandon()
    return {"embeddings": trainer.bank.rows, **trainer.objective.tables()}


@pytest.mark.slow
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
    steps = [row["step"] for row in measured(run) if row["kind"] == "train"]
    assert steps == list(range(1, 10))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    images = write_pictures(tmp_path / "images", 40, classes=4)
    command = [sys.executable, "-m", "instdisc.train", "sample", *OPTIONS, "--training.epochs", "300"]
    command += ["--data.path", str(images), "--data.test-path", "None", "--run-dir", str(tmp_path / "run")]
    run = RunDirectory(tmp_path / "run")
    with killed_at_last(command) as program:
        wait_until(lambda: run.journal.exists() and '"step": 7,' in run.journal.read_text(), timeout_s=120)
        program.send_signal(number)
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 130, said
    assert f"stopped by {number.name} at step" in said
    assert "Traceback" not in said
    step = newest_step(run.snapshots)
    assert step is not None
    assert step >= 7
    with killed_at_last(command):
        wait_until(lambda: f'"step": {step + 3},' in run.journal.read_text(), timeout_s=120)
    messages = [json.loads(line).get("message") for line in run.journal.read_text().splitlines()]
    assert f"resuming from the snapshot of step {step}, 1 worker(s)" in messages


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_bank_goes_on_bit_for_bit(run: Run, tmp_path: Path, dtype: str) -> None:
    images = write_pictures(tmp_path / "images", 40)
    half = ["--bank.dtype", dtype, "--snapshots.every-steps", "2", "--snapshots.keep", "9"]
    assert run(images, *half)[0] == 0
    whole = snapshot_content(RunDirectory(tmp_path / "out"))
    for newest in sorted((tmp_path / "out" / "snapshots").iterdir())[1:]:
        newest.rename(tmp_path / newest.name)
    (tmp_path / "out" / "summary.json").unlink()
    status, said, out = run(images, *half)
    assert status == 0, said
    assert snapshot_content(RunDirectory(out)) == whole


def test_a_damaged_snapshot_is_named_and_the_one_before_it_serves(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40)
    _, _, out = run(images, "--snapshots.every-steps", "2")
    (out / "summary.json").unlink()
    newest = max((out / "snapshots").iterdir())
    chunk = next(newest.glob("*/tables.zarr/embeddings/c.0.0"))
    data = bytearray(chunk.read_bytes())
    data[9] ^= 1
    chunk.write_bytes(data)
    status, said, _ = run(images)
    assert status == 2
    for text in ("tables.zarr/embeddings/c.0.0", "checksum", f"move {newest.name} away"):
        assert text in said
    newest.rename(tmp_path / "moved")
    status, said, _ = run(images)
    assert status == 0, said
    assert newest_step(out / "snapshots") == int(newest.name.removeprefix("step-"))


def test_training_survives_snapshots_that_fail(run: Run, tmp_path: Path) -> None:
    """The place of the second snapshot is taken by a file; the end needs that of the last one."""
    images = write_pictures(tmp_path / "images", 40)
    options = [
        "--training.epochs",
        "1",
        "--snapshots.every-steps",
        "2",
        "--snapshots.url",
        str(tmp_path / "there"),
    ]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "step-000000002").write_text("in the way")
    status, said, out = run(images, *options)
    assert status == 0, said
    assert "snapshot failed" in said
    assert RunDirectory(out).open_snapshot().step == 5
    assert not (out / "snapshots").exists()


def test_another_place_for_snapshots(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40)
    there = ["--snapshots.url", "there/"]
    assert run(images, *there)[0] == 0
    assert newest_step(tmp_path / "there") == 10
    assert run(images)[0] == 0  # it is complete, and knows where
    refused(run(images, "--snapshots.url", "elsewhere"), "snapshots is", "there", "elsewhere")
    (tmp_path / "out").rename(tmp_path / "away")
    refused(run(images, *there), "another run's", "new run", "--overwrite")
    assert run(images, *there, "--overwrite", "--training.epochs", "1")[0] == 0
    assert newest_step(tmp_path / "there") == 5


def test_snapshots_of_a_run_that_has_just_begun_are_not_taken_over(run: Run, tmp_path: Path) -> None:
    """Before its first commit too, though there is nothing but the name of the run."""
    images = write_pictures(tmp_path / "images", 40)
    take_over(tmp_path / "there", "another")
    options = ["--snapshots.url", str(tmp_path / "there")]
    refused(run(images, *options), "another run's", "--overwrite")
    assert run(images, *options, "--overwrite")[0] == 0
    assert owner_of(tmp_path / "there") == json.loads((tmp_path / "out/config.json").read_text())["run_id"]


def test_snapshots_of_a_run_with_the_same_settings_are_not_mistaken(run: Run, tmp_path: Path) -> None:
    """Another run, with --overwrite, took the place of this one's snapshots."""
    images = write_pictures(tmp_path / "images", 40)
    there = ["--snapshots.url", str(tmp_path / "there")]
    _, _, out = run(images, *there)
    out.rename(tmp_path / "first")
    assert run(images, *there, "--overwrite")[0] == 0
    (out / "summary.json").unlink()
    (out / "config.json").write_text((tmp_path / "first/config.json").read_text())
    refused(run(images, *there), "belong to a run whose run id is", "--overwrite")


def test_images_that_moved(run: Run, tmp_path: Path) -> None:
    """Training and test images alike; others in their place are refused."""
    images = write_pictures(tmp_path / "images", 40, classes=4)
    test = write_pictures(tmp_path / "test", 8, classes=4)
    _, _, out = run(images, "--data.test-path", str(test))
    (out / "summary.json").unlink()
    moved = tmp_path / "moved"
    moved.mkdir()
    images, test = images.rename(moved / "images"), test.rename(moved / "test")
    status, said, _ = run(images, "--data.test-path", str(test))
    assert status == 0, said
    assert Manifest.load(out / "test_manifest").root == test
    (out / "summary.json").unlink()
    next(test.rglob("*.png")).unlink()
    refused(run(images, "--data.test-path", str(test)), "the test images are 8", "7 with")


@pytest.mark.parametrize("files_moved", [0, 1, 2, 3])
def test_a_start_that_was_interrupted_begins_again(
    run: Run, tmp_path: Path, files_moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the prepared files take the place of those of the run before."""
    images = write_pictures(tmp_path / "images", 40, classes=4)
    test = ["--data.test-path", str(write_pictures(tmp_path / "test", 8, classes=4))]
    _, _, out = run(images)
    left = [files_moved]

    def rename(path: Path, target: Path) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        path.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        run(images, *test, "--overwrite")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(out).manifests()[1] is not None
    status, said, _ = run(images, *test)
    assert status == 0, said
    assert json.loads((out / "summary.json").read_text())["knn_protocol"] == "test-set"


def test_a_run_that_lacks_only_its_summary_is_completed(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40, classes=4)
    _, _, out = run(images)
    before, lines = json.loads((out / "summary.json").read_text()), measured(RunDirectory(out))
    (out / "summary.json").unlink()
    status, said, _ = run(images)
    assert status == 0, said
    after = json.loads((out / "summary.json").read_text())
    for name in ("knn_top1", "knn_top1_bank", "knn_top1_raw_pixels", "knn_top1_untrained", "loss", "steps"):
        assert after[name] == before[name]
    assert measured(RunDirectory(out)) == lines
