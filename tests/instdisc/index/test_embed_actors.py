"""An index written by processes of a Ray cluster is the one that a single process writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.collection import open_collection
from tests.instdisc.index.conftest import Embed
from tests.ray_cluster import RayCluster


def test_many_processes_write_the_same_index(
    embed: Embed, trained: Path, tmp_path: Path, ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    here = [trained, "--block-rows", "4"]
    assert embed(*here, output=tmp_path / "one")[0] == 0
    status, said = embed(*here, "--num-actors", "2", output=tmp_path / "two")
    assert status == 0, said
    assert "30 images added" in said
    one, two = open_collection(tmp_path / "one"), open_collection(tmp_path / "two")
    assert [entry.name for entry in one.blocks] == [entry.name for entry in two.blocks]
    for table in one.tables:
        np.testing.assert_array_equal(one.read(table), two.read(table))


def test_an_error_of_an_actor_is_told_and_what_was_written_stays(
    embed: Embed,
    trained: Path,
    images: Path,
    tmp_path: Path,
    ray_cluster: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder of the images has gone after the first blocks were embedded, and comes back."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    assert embed(trained, "--data.path", images, "--block-rows", "4", output=tmp_path / "whole")[0] == 0
    kept = {path.name: path for path in sorted((tmp_path / "whole" / "blocks").iterdir())[:3]}
    blocks = tmp_path / "index" / "blocks"
    blocks.mkdir(parents=True)
    for name, path in kept.items():
        path.rename(blocks / name)
    away = images.rename(tmp_path / "away")
    more = [trained, "--data.root", images, "--block-rows", "4", "--num-actors", "1"]
    status, said = embed(*more)
    assert status == 2, said
    assert f"cannot read {images}" in said
    assert "Traceback" not in said
    assert not (tmp_path / "index" / "STATE.json").exists()
    commits = {name: (blocks / name / "COMMIT.json").read_bytes() for name in kept}
    away.rename(images)
    status, said = embed(*more)
    assert status == 0, said
    assert "30 images added" in said
    assert commits == {name: (blocks / name / "COMMIT.json").read_bytes() for name in kept}
