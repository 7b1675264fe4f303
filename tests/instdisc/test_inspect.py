"""What `python -m instdisc.inspect` prints of whole and of broken runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from instdisc.inspect import main
from tests.instdisc.program import Run, write_pictures


def inspected(capfd: pytest.CaptureFixture[str], path: Path) -> tuple[int, str]:
    status = main([str(path)])
    captured = capfd.readouterr()
    return status, captured.out + captured.err


def test_whole_and_broken(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, said, out = run(
        write_pictures(tmp_path / "images", 20, classes=2), "--snapshots.every-steps", "2"
    )
    assert status == 0, said
    for path in (out, out / "snapshots", out / "snapshots" / "step-000000004"):
        status, said = inspected(capfd, path)
        assert status == 0, said
        for text in ("step 4", "20 rows", "embeddings", "20 x 16", "keys", "all checksums agree"):
            assert text in said
    assert "recipe sample" in inspected(capfd, out)[1]
    chunk = next((out / "snapshots" / "step-000000002").glob("*/tables.zarr/embeddings/c.0.0"))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 4
    chunk.write_bytes(data)
    status, said = inspected(capfd, out)
    assert status == 1
    assert "broken: " in said
    assert "step-000000002: tables.zarr/embeddings/c.0.0: its checksum differs" in said
    (out / "snapshots" / "step-000000004" / "COMMIT.json").write_text('{"schema_ver')
    status, said = inspected(capfd, out)
    assert status == 1
    assert "2 broken" in said
    assert "truncated" in said


def test_a_broken_manifest(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, _, out = run(write_pictures(tmp_path / "images", 20))
    (out / "manifest" / "meta.json").write_text("{}")
    status, said = inspected(capfd, out)
    assert status == 1
    assert "broken: " in said
    assert "manifest" in said


def test_missing_pieces_are_all_named_and_missing_snapshots_are_no_success(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, _, out = run(write_pictures(tmp_path / "images", 20))
    (snapshot,) = (out / "snapshots").glob("step-*")
    for name in ("network.safetensors", "tables.zarr/embeddings/c.0.0"):
        next(snapshot.glob(f"*/{name}")).unlink()
    for path in (out, snapshot):
        status, said = inspected(capfd, path)
        assert status == 1
        assert "network.safetensors: missing" in said
        assert "tables.zarr/embeddings/c.0.0: missing" in said
        assert "2 broken" in said
    shutil.rmtree(out / "snapshots")
    status, said = inspected(capfd, out)
    assert status == 1
    assert "no snapshot, though the run is complete" in said
    (out / "summary.json").unlink()
    status, said = inspected(capfd, out)
    assert status == 0
    assert "no snapshot yet" in said


def test_snapshots_that_cannot_be_reached(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, _, out = run(write_pictures(tmp_path / "images", 20))
    settings = json.loads((out / "config.json").read_text())
    settings["snapshots"]["url"] = "nosuch://place"
    (out / "config.json").write_text(json.dumps(settings))
    for path in (str(out), "nosuch://place"):
        assert main([path]) == 2
        assert "error: nosuch://place: cannot be read" in capfd.readouterr().err


def test_nothing_to_inspect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        status, said = inspected(capfd, path)
        assert status == 2
        assert "error: " in said
