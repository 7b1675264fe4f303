"""Vectors as Parquet and NumPy files: what was stored, each with its key and its network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from cluster.collection import open_collection
from cluster.snapshots import open_snapshot
from cluster.tables import Tables
from instdisc.export import main
from instdisc.index.model import model_of
from tests.instdisc.index.conftest import Embed
from tests.instdisc.program import picture


@pytest.fixture
def exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Export, run what is printed below the path, and return the names it defines."""

    def exported(source: Path, kind: str) -> dict[str, Any]:
        file = tmp_path / "out" / f"vectors.{kind}"
        assert main([str(source), "--format", kind, "--output", str(file)]) == 0
        printed = capfd.readouterr().out
        assert printed.startswith(str(file))
        names: dict[str, Any] = {"file": file}
        exec(printed.partition("\n\n")[2], names)
        return names

    return exported


@pytest.fixture(params=["run", "index"])
def source(request: pytest.FixtureRequest, embed: Embed, trained: Path, images: Path, tmp_path: Path) -> Any:
    """What is exported, and its tables."""
    if request.param == "run":
        return trained, open_snapshot(trained / "snapshots")
    picture(0).save(os.fsencode(images) + b"/red/caf\xe9.png")
    assert embed(trained, "--data.path", images, "--dtype", "float16")[0] == 0
    return tmp_path / "index", open_collection(tmp_path / "index")


def raw_keys(tables: Tables) -> list[bytes]:
    return [key.encode().replace(b"\\xe9", b"\xe9") for key in tables.read("keys")]


def test_parquet(exported: Any, source: tuple[Path, Tables]) -> None:
    place, tables = source
    names = exported(place, "parquet")
    table = names["table"]
    np.testing.assert_array_equal(names["vectors"], tables.read("embeddings").astype(np.float32))
    assert table["key"].to_pylist() == tables.read("keys").tolist()
    assert table["key_bytes"].to_pylist() == raw_keys(tables)
    assert table["label"].to_pylist() == tables.read("labels").tolist()
    classes = tables.attributes["class_names"]
    assert table["class"].to_pylist() == [classes[label] for label in tables.read("labels")]
    assert set(table["model"].to_pylist()) == {str(model_of(tables))}
    noted = pq.read_schema(names["file"]).metadata[b"model"]
    assert json.loads(noted) == model_of(tables).to_json()


def test_npy(exported: Any, source: tuple[Path, Tables]) -> None:
    place, tables = source
    rows = exported(place, "npy")["rows"]
    np.testing.assert_array_equal(rows["vector"], tables.read("embeddings").astype(np.float32))
    assert rows["key"].tolist() == raw_keys(tables)
    assert rows["label"].tolist() == tables.read("labels").tolist()
    assert set(rows["model"].tolist()) == {str(model_of(tables)).encode()}


def test_the_network_of_an_index_is_exported(embed: Embed, trained: Path, tmp_path: Path) -> None:
    embed(trained)
    for source, file in ((trained, "run.safetensors"), (tmp_path / "index", "index.safetensors")):
        assert main([str(source), "--format", "safetensors", "--output", str(tmp_path / file)]) == 0
    first, second = (load_file(tmp_path / f"{each}.safetensors") for each in ("run", "index"))
    assert {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in second.items()
    }


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_nothing_to_export(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    assert main([str(tmp_path / "nothing"), "--format", kind]) == 2
    assert "error: " in capfd.readouterr().err
