"""Whatever happens while a snapshot is written, it is whole or invisible, and the writer's process lives on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotWriter
from cluster.snapshots import SnapshotError, open_snapshot
from tests.cluster.snapshot_ranks import assert_holds, save, write, writers

NUM_ROWS = 1_003
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_sigkill_leaves_whole_commits(tmp_path: Path, world_size: int) -> None:
    """One process writes for all ranks, so that a kill interrupts all of them, at any moment."""
    moments = random.Random(world_size)
    newest = 0
    for attempt in range(3):
        arguments = [str(tmp_path), str(NUM_ROWS), str(world_size), str(newest + 1), f"attempt{attempt}"]
        with subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.snapshot_ranks", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            for _ in range(3):  # the third save begins when the first is committed
                assert process.stdout.readline()
            time.sleep(moments.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        snapshot = open_snapshot(tmp_path)
        assert snapshot.step > newest
        assert_holds(snapshot, NUM_ROWS)
        newest = snapshot.step


def test_full_disk_fails_the_snapshot_only(small_disk: Path) -> None:
    reports = write(small_disk, 1, NUM_ROWS, world_size=2, keep=1)
    assert [report.error for report in reports] == [None, None]
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 40_000))
    ranks = writers(small_disk, NUM_ROWS, 2, "second", keep=1)
    save(ranks, 2, NUM_ROWS)
    for writer in ranks:
        writer.wait()
    assert "No space left on device" in str(ranks[0].poll()[0].error)
    assert_holds(open_snapshot(small_disk), NUM_ROWS)
    ballast.unlink()
    save(ranks, 3, NUM_ROWS)
    for writer in ranks:
        writer.close()
    assert ranks[0].poll()[0].error is None
    assert open_snapshot(small_disk).step == 3
    assert_holds(open_snapshot(small_disk), NUM_ROWS)


def test_read_only_directory_fails_the_snapshot_only(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:  # whom permissions do not stop
        _mount("--bind", str(tmp_path), str(tmp_path))
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
    try:
        (report,) = write(tmp_path, 2, NUM_ROWS, attempt="second")
        assert "Read-only" in str(report.error) or "Permission denied" in str(report.error)
        assert_holds(open_snapshot(tmp_path), NUM_ROWS)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        tmp_path.chmod(0o755)


def test_vanished_store_is_reported_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    ranks = writers(folder, NUM_ROWS, 1, "first")
    save(ranks, 1, NUM_ROWS)
    ranks[0].wait()
    snapshot = open_snapshot(folder)
    shutil.rmtree(folder)
    folder.write_text("no directory any more")
    save(ranks, 2, NUM_ROWS)
    ranks[0].wait()
    assert [report.error is None for report in ranks[0].poll()] == [True, False]
    with pytest.raises(SnapshotError, match=r"tables.zarr/labels: cannot be read .* does not exist"):
        snapshot.read("labels")
    folder.unlink()
    save(ranks, 3, NUM_ROWS)
    ranks[0].close()
    assert ranks[0].poll()[0].error is None
    assert_holds(open_snapshot(folder), NUM_ROWS)


def test_rank_that_never_writes_fails_the_snapshot(tmp_path: Path) -> None:
    partition = Partition(NUM_ROWS, 2)
    writer = SnapshotWriter(tmp_path, partition, 0, "first", timeout_s=0.5)
    writer.save(1, {"rows": torch.zeros(partition.stop(0), 2)})
    writer.wait()
    assert "rank 1 did not write its part within 0.5 s" in str(writer.poll()[0].error)
    patient = SnapshotWriter(tmp_path, partition, 0, "second", timeout_s=600)
    patient.save(2, {"rows": torch.zeros(partition.stop(0), 2)})
    patient.close(timeout_s=0.5)
    assert "closed before rank 1 had written its part" in str(patient.poll()[0].error)
    with pytest.raises(SnapshotError, match="no committed snapshot"):
        open_snapshot(tmp_path)


def test_ranks_that_disagree_fail_the_snapshot(tmp_path: Path) -> None:
    partition = Partition(NUM_ROWS, 2)
    ranks = [SnapshotWriter(tmp_path, partition, rank, "first") for rank in range(2)]
    sizes = [partition.stop(0), NUM_ROWS - partition.stop(0)]
    for step, (files, width) in enumerate([(["same", "same"], 2), (["a", "b"], 3)]):
        for rank, writer in enumerate(ranks):
            rows = torch.zeros(sizes[rank], width if rank else 2)
            writer.save(step, {"rows": rows}, {files[rank]: b"x"})
    for writer in ranks:
        writer.close()
    first, second = ranks[0].poll()
    assert "wrote same, which another rank wrote as well" in str(first.error)
    assert "rank 1 wrote tables" in str(second.error)
