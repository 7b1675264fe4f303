"""Snapshots in an S3 bucket, on a server of its own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs

from cluster.snapshots import SnapshotError, open_snapshot
from tests.cluster.snapshot_ranks import assert_holds, save, write, writers
from tests.s3 import s3_bucket, s3_server

NUM_ROWS = 1_003


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    return s3_bucket(endpoint, "runs", monkeypatch)


def test_commit_read_verify_and_keep(bucket: s3fs.S3FileSystem) -> None:
    url = "s3://runs/kept/snapshots"
    with pytest.raises(SnapshotError, match="no committed snapshot"):
        open_snapshot(url)
    ranks = writers(url, NUM_ROWS, 2, "first", keep=1)
    bucket.pipe_file("runs/kept/snapshots/step-000000002/crashed/tables.zarr/zarr.json", b"{}")
    for step in (1, 3):
        save(ranks, step, NUM_ROWS)
    for writer in ranks:
        writer.close()
    assert [report.error for report in ranks[0].poll()] == [None, None]
    assert bucket.ls("runs/kept/snapshots") == ["runs/kept/snapshots/step-000000003"]
    snapshot = open_snapshot(url)
    assert snapshot.read_file("rank-1.bin") == b"3/1"
    assert_holds(snapshot, NUM_ROWS)


def test_damage_is_named(bucket: s3fs.S3FileSystem) -> None:
    write("s3://runs/damaged", 1, NUM_ROWS)
    write("s3://runs/damaged", 2, NUM_ROWS)
    snapshot = open_snapshot("s3://runs/damaged")
    folder = "runs/damaged/step-000000002"
    chunk = bytearray(bucket.cat_file(f"{folder}/first/tables.zarr/embeddings/c.3.0"))
    chunk[5] ^= 1
    bucket.pipe_file(f"{folder}/first/tables.zarr/embeddings/c.3.0", bytes(chunk))
    bucket.rm(f"{folder}/first/tables.zarr/labels/c.2")
    assert snapshot.verify() == [
        "tables.zarr/embeddings/c.3.0: its checksum differs",
        "tables.zarr/labels/c.2: missing",
    ]
    with pytest.raises(SnapshotError, match=r"embeddings/c.3.0: its checksum differs"):
        snapshot.read("embeddings")
    with pytest.raises(SnapshotError, match=r"labels/c.2: missing"):
        snapshot.read("labels")
    bucket.rm(f"{folder}/COMMIT.json")
    assert open_snapshot("s3://runs/damaged").step == 1


def test_missing_bucket_fails_the_snapshot_only(bucket: s3fs.S3FileSystem) -> None:
    (report,) = write("s3://nowhere/snapshots", 1, NUM_ROWS)
    assert "bucket does not exist" in str(report.error)
    with pytest.raises(SnapshotError, match="s3://nowhere/snapshots"):
        open_snapshot("s3://nowhere/snapshots")
