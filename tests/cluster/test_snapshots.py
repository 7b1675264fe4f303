"""A snapshot reads back what was written, by any number of ranks, and refuses what is damaged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotWriter
from cluster.snapshots import SnapshotError, open_snapshot, seal, snapshot_steps
from tests.cluster.snapshot_ranks import assert_holds, save, table_rows, write, writers

NUM_ROWS = 1_003  # blocks of 32, the last one not full


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [3, 97, NUM_ROWS])
def test_any_number_of_ranks_writes_the_same_tables(tmp_path: Path, world_size: int, num_rows: int) -> None:
    reports = write(tmp_path, 7, num_rows, world_size)
    assert [report.error for report in reports] == [None] * world_size
    snapshot = pickle.loads(pickle.dumps(open_snapshot(tmp_path)))
    assert (snapshot.step, snapshot.num_rows, snapshot.attributes["schema_version"]) == (7, num_rows, 1)
    assert snapshot.tables["half"] == ((num_rows, 6), "bfloat16")
    assert snapshot.tables["keys"] == ((num_rows,), "string")
    assert [snapshot.read_file(name) for name in snapshot.files] == [
        b"7/%d" % rank for rank in range(world_size)
    ]
    assert_holds(snapshot, num_rows)


def test_other_numbers_of_ranks_read_their_rows(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS, world_size=3)
    snapshot = open_snapshot(tmp_path / "step-000000001")
    partition = Partition(NUM_ROWS, 2)
    for name, rows in table_rows(1, NUM_ROWS).items():
        shards = [snapshot.read(name, partition.start(rank), partition.stop(rank)) for rank in range(2)]
        expected = rows.float().numpy() if isinstance(rows, torch.Tensor) else rows
        np.testing.assert_array_equal(np.concatenate(shards), expected)
    assert snapshot.read("labels", 5, 5).shape == (0,)


def test_caller_may_change_rows_while_they_are_written(tmp_path: Path) -> None:
    rows = torch.ones(NUM_ROWS, 4)
    keys = np.array(["a"] * NUM_ROWS, dtype=object)
    writer = SnapshotWriter(tmp_path, Partition(NUM_ROWS, 1), 0, "first", keep=3)
    for step in (1, 2, 3):
        writer.save(step, {"rows": rows, "keys": keys})
        rows += 1
        keys[:] = "b"
    writer.close()
    assert [report.error for report in writer.poll()] == [None] * 3
    for step in (1, 2, 3):
        snapshot = open_snapshot(tmp_path / f"step-{step:09d}")
        assert (snapshot.read("rows") == step).all()
        assert (snapshot.read("keys") == ("a" if step == 1 else "b")).all()


@pytest.mark.parametrize("keep", [1, 3])
def test_newest_are_kept_and_debris_goes(tmp_path: Path, keep: int) -> None:
    ranks = writers(tmp_path, NUM_ROWS, 2, "first", keep)
    (tmp_path / "step-000000002" / "crashed" / "tables.zarr").mkdir(parents=True)
    (tmp_path / "step-000000009").mkdir()
    for step in range(1, 6):
        save(ranks, step, NUM_ROWS)
    for writer in ranks:
        writer.close()
    kept = [f"step-{step:09d}" for step in range(6 - keep, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "step-000000009"]
    assert_holds(open_snapshot(tmp_path), NUM_ROWS)


def test_later_attempt_replaces_a_commit_and_ignores_what_an_earlier_one_left(tmp_path: Path) -> None:
    write(tmp_path, 4, NUM_ROWS, world_size=3)
    earlier = open_snapshot(tmp_path)
    (tmp_path / "step-000000004" / "COMMIT.json").unlink()  # as if killed just before
    write(tmp_path, 4, NUM_ROWS, world_size=2, attempt="second")
    snapshot = open_snapshot(tmp_path)
    assert snapshot.files == ["rank-0.bin", "rank-1.bin"]
    assert_holds(snapshot, NUM_ROWS)
    assert_holds(earlier, NUM_ROWS)  # whoever reads it goes on undisturbed


@pytest.mark.parametrize(
    "piece",
    [
        "tables.zarr/embeddings/c.3.0",
        "tables.zarr/keys/c.3",
        "tables.zarr/embeddings/zarr.json",
        "rank-0.bin",
    ],
)
def test_flipped_bit_is_found_and_named(tmp_path: Path, piece: str) -> None:
    write(tmp_path, 1, NUM_ROWS)
    snapshot = open_snapshot(tmp_path)
    file = tmp_path / "step-000000001" / "first" / piece
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert snapshot.verify() == [f"{piece}: its checksum differs"]
    open_snapshot(tmp_path)
    with pytest.raises(SnapshotError, match=f"{piece}: its checksum differs"):
        snapshot.read_file(piece) if piece == "rank-0.bin" else snapshot.read(piece.split("/")[1])
    if "/c." in piece:
        snapshot.read(piece.split("/")[1], 0, 3 * 32)  # its other chunks stay readable


def test_chunks_of_another_step_are_found(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    write(tmp_path, 2, NUM_ROWS)
    chunk = "first/tables.zarr/embeddings/c.3.0"
    (tmp_path / "step-000000001" / chunk).replace(tmp_path / "step-000000002" / chunk)
    assert open_snapshot(tmp_path).verify() == ["tables.zarr/embeddings/c.3.0: its checksum differs"]


def test_missing_chunk_is_named_on_opening_and_on_reading(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    snapshot = open_snapshot(tmp_path)
    (tmp_path / "step-000000001/first/tables.zarr/labels/c.2").unlink()
    for read in (lambda: open_snapshot(tmp_path), lambda: snapshot.read("labels")):
        with pytest.raises(SnapshotError, match=r"tables.zarr/labels/c.2: missing; restore that file"):
            read()
    assert snapshot.verify() == ["tables.zarr/labels/c.2: missing"]


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "st', b"[1]", b"\xff\x00"])
def test_truncated_commit_is_refused_and_the_one_before_stays_usable(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 1, NUM_ROWS)
    write(tmp_path, 2, NUM_ROWS)
    (tmp_path / "step-000000002" / "COMMIT.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"step-000000002/COMMIT.json: damaged or truncated"):
        open_snapshot(tmp_path)
    assert_holds(open_snapshot(tmp_path / "step-000000001"), NUM_ROWS)


def test_changed_commit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    file = tmp_path / "step-000000001" / "COMMIT.json"
    file.write_text(file.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(SnapshotError, match=r"COMMIT.json: its checksum differs"):
        open_snapshot(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    file = tmp_path / "step-000000001" / "COMMIT.json"
    file.write_bytes(seal({**json.loads(file.read_text()), "schema_version": 2}))
    with pytest.raises(SnapshotError, match="schema version 2, this program reads up to 1; update"):
        open_snapshot(tmp_path)


def test_no_snapshot_is_said(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no committed snapshot"):
        open_snapshot(tmp_path / "nowhere")
    (tmp_path / "step-000000003").mkdir()
    with pytest.raises(SnapshotError, match="no committed snapshot"):
        open_snapshot(tmp_path)
    with pytest.raises(SnapshotError, match=r"no COMMIT.json, so this snapshot was never finished"):
        open_snapshot(tmp_path / "step-000000003")


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path, 1, NUM_ROWS)
    snapshot = open_snapshot(tmp_path)
    with pytest.raises(SnapshotError, match="no table 'bank'; it has embeddings"):
        snapshot.read("bank")
    with pytest.raises(SnapshotError, match=r"no file 'COMMIT.json'"):
        snapshot.read_file("COMMIT.json")
    with pytest.raises(ValueError, match="rows 5 to 1004"):
        snapshot.read("labels", 5, NUM_ROWS + 1)
    writer = SnapshotWriter(tmp_path, Partition(NUM_ROWS, 2), 1, "second")
    with pytest.raises(ValueError, match="got 1003 rows, rank 1 owns"):
        writer.save(2, {"rows": torch.zeros(NUM_ROWS, 2)})
    with pytest.raises(ValueError, match=r"got file '../x'"):
        writer.save(2, {}, {"../x": b""})
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.save(2, {}, {}, {"loss": float("nan")})
    writer.save(2, {})
    with pytest.raises(ValueError, match="got step 1 after 2"):
        writer.save(1, {})
    writer.close()


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    asked = []

    def best(steps: Sequence[int]) -> int | None:
        asked.append(list(steps))
        return 2 if 2 in steps else None

    writer = SnapshotWriter(tmp_path, Partition(NUM_ROWS, 1), 0, "first", keep=1, best=best)
    for step in range(1, 5):
        writer.save(step, {"rows": np.zeros((NUM_ROWS, 2), np.float32)})
    writer.close()
    assert [report.error for report in writer.poll()] == [None] * 4
    assert asked == [[1], [1, 2], [2, 3], [2, 3, 4]]
    assert snapshot_steps(tmp_path) == [2, 4]
