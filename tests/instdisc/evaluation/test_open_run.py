"""The Python face on a small trained run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import instdisc
from cluster.errors import SnapshotError
from cluster.snapshots import open_snapshot
from instdisc.evaluation.open_run import Run
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from tests.instdisc.program import picture
from tests.instdisc.test_evaluate import train_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"), None)


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return instdisc.open_run(trained)


def test_rows_are_those_of_the_snapshot_and_the_manifest(run: Run, trained: Path) -> None:
    embeddings, keys = run.embeddings(), run.keys()
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(run), 16)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(len(run)), abs=1e-5)
    assert list(keys) == list(Manifest.load(trained / "manifest").keys)


def test_nearest_rows_are_those_of_all_inner_products(run: Run) -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 16))
    scores, rows = run.nearest(vectors, 5)
    expected = vectors.astype(np.float32) @ run.embeddings().T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert rows.tolist() == order.tolist()
    assert scores == pytest.approx(np.take_along_axis(expected, order, axis=1), abs=1e-5)


def test_image_files_are_embedded_as_the_network_does(run: Run, trained: Path) -> None:
    image = trained.parent / "train" / run.keys()[3]
    (vector,) = run.embed([image])
    settings = run.snapshot.attributes["settings"]["augmentation"]
    pixels = np.asarray(Image.open(image)) / 255
    normalized = torch.from_numpy((pixels - settings["mean"]) / settings["std"]).permute(2, 0, 1)
    with torch.no_grad():
        expected = run.network()(normalized[None].float())[0]
    assert vector == pytest.approx(expected.numpy(), abs=2e-3)


def test_a_network_is_the_callers_own(run: Run) -> None:
    network = run.network()
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert next(run.network().parameters()).any()


@pytest.mark.parametrize("place", ["snapshots", "step"])
def test_snapshots_away_from_their_run_are_enough(
    run: Run, trained: Path, tmp_path: Path, place: str
) -> None:
    shutil.copytree(trained / "snapshots", tmp_path / "elsewhere")
    source = tmp_path / "elsewhere"
    if place == "step":
        source = Path(open_snapshot(source).url)
    for name in (source, f"file://{source}"):
        moved = instdisc.open_run(name)
        assert (moved.embeddings() == run.embeddings()).all()
        assert moved.nearest(run.embeddings()[:2], 1)[1].shape == (2, 1)


@pytest.mark.parametrize(
    ("vectors", "k", "text"),
    [
        (np.ones(16), 1, r"shape \(16,\), expected \(Q, 16\)"),
        (np.ones((2, 8)), 1, r"shape \(2, 8\), expected \(Q, 16\)"),
        (np.full((1, 16), np.nan), 1, "NaN or infinity"),
        (np.ones((1, 16)), 0, "k is 0, expected 1 to 30"),
        (np.ones((1, 16)), 31, "k is 31, expected 1 to 30"),
    ],
)
def test_what_cannot_be_searched_is_refused(run: Run, vectors: np.ndarray, k: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run.nearest(vectors, k)


def test_images_that_cannot_be_embedded_are_named(run: Run, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-100])
    for name in ("missing.png", "cut.png"):
        with pytest.raises(DataError, match=name):
            run.embed([tmp_path / name])
    with pytest.raises(ValueError, match="at least one"):
        run.embed([])


def test_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no committed snapshot, for it does not exist"):
        instdisc.open_run(tmp_path / "nothing")
