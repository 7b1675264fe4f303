"""The search program on a small trained run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.covariance import LedoitWolf

import instdisc
from cluster.snapshots import open_snapshot
from instdisc.runs.run_directory import RunDirectory
from instdisc.search import main
from instdisc.settings.recipes import RECIPES
from pipelines.manifest import Manifest
from tests.instdisc.program import solid
from tests.instdisc.test_evaluate import CLASSES, train_small

CIFAR_MEAN, CIFAR_STD = (getattr(RECIPES["sample"].config.augmentation, name) for name in ("mean", "std"))
Search = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train_small(folder, solid(folder / "test", CLASSES, 2))


@pytest.fixture
def search(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Search:
    def search(*arguments: Path | str, source: Path | str = trained) -> tuple[int, str]:
        options = ["--loader.threads", "1", "--output", str(tmp_path / "drawn.png")]
        try:
            status = main([str(source), *options, *map(str, arguments)])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return search


def test_nearest_rows_are_printed_and_drawn(search: Search, trained: Path, tmp_path: Path) -> None:
    folder = trained.parent / "train"
    queries = [folder / "red" / "3.png", folder / "blue" / "0.png"]
    status, said = search(*queries, "--k", "4")
    assert status == 0, said
    run, snapshot = RunDirectory(trained), open_snapshot(trained / "snapshots")
    bank, keys = snapshot.read("embeddings"), list(Manifest.load(run.manifest).keys)
    with Image.open(tmp_path / "drawn.png") as drawing:
        assert drawing.format == "PNG"
        pixels = drawing.convert("RGB")
    for name in ("red", "blue"):  # k = 5 is what the run was told
        assert re.search(rf"vote of the 5 nearest labeled rows: {name}, \d+% of the votes", said)
    parts = said.split(str(queries[1]))
    for number, (part, query) in enumerate(zip(parts, queries, strict=True)):
        with Image.open(query) as image:
            values = torch.from_numpy(np.asarray(image) / 255 - CIFAR_MEAN) / torch.tensor(CIFAR_STD)
        with torch.no_grad():
            embedding = instdisc.open_run(trained).network()(values.permute(2, 0, 1)[None].float())[0].numpy()
        similarities = bank @ embedding
        nearest = np.argsort(-similarities)[:4]
        found = [line.split() for line in part.splitlines() if "(row" in line]
        assert [line[2] for line in found] == [keys[row] for row in nearest]
        assert [float(line[0]) for line in found] == pytest.approx(similarities[nearest], abs=2e-3)
        for column, label in enumerate([query.parent.name, *(line[1] for line in found)]):
            left = 10 + column * 122 + (10 if column else 0)
            pixel = pixels.getpixel((left + 56, 10 + 56 + number * 156))
            assert max(range(3), key=pixel.__getitem__) == list(CLASSES).index(label)


def test_whitened_rows_are_searched(search: Search, trained: Path) -> None:
    """A training image that is searched for finds itself, and the scores are those worked out here."""
    query = trained.parent / "train" / "red" / "3.png"
    status, said = search(query, "--k", "30", "--readout", "whitened")
    assert status == 0, said
    run, manifest = instdisc.open_run(trained), Manifest.load(RunDirectory(trained).manifest)
    names = [manifest.root / manifest.name(row) for row in range(len(manifest))]
    rows = torch.from_numpy(run.embed(names)).double()
    covariance = torch.from_numpy(LedoitWolf().fit(rows.numpy()).covariance_)
    values, vectors = torch.linalg.eigh(covariance)
    white = torch.nn.functional.normalize((rows - rows.mean(dim=0)) @ (vectors / values.sqrt()), dim=1)
    own = names.index(query)
    found = [line.split() for line in said.splitlines() if "(row" in line]
    assert float(found[0][0]) == pytest.approx(1, abs=2e-3)
    assert found[0][2] == manifest.name(own)
    expected = (white @ white[own]).sort(descending=True).values
    assert [float(line[0]) for line in found] == pytest.approx(expected.numpy(), abs=2e-3)


def test_features_are_searched(search: Search, trained: Path) -> None:
    query = trained.parent / "train" / "red" / "3.png"
    status, said = search(query, "--k", "5", "--readout", "features")
    assert status == 0, said
    found = [line.split() for line in said.splitlines() if "(row" in line]
    assert (float(found[0][0]), found[0][2]) == (pytest.approx(1, abs=2e-3), "red/3.png")
    assert {line[1] for line in found} == {"red"}
    assert "class by the vote" in said


@pytest.mark.parametrize("readout", ["whitened", "features"])
def test_whitening_needs_the_images(search: Search, trained: Path, tmp_path: Path, readout: str) -> None:
    shutil.copytree(trained / "snapshots", tmp_path / "away")
    query = trained.parent / "train" / "red" / "3.png"
    status, said = search(query, "--k", "3", "--readout", readout, source=tmp_path / "away")
    assert status == 2, said
    assert "give the run directory" in said


def test_a_snapshot_of_the_run_can_be_named(search: Search, trained: Path) -> None:
    (snapshot,) = (trained / "snapshots").glob("step-*")
    status, said = search(trained.parent / "train" / "red" / "0.png", "--k", "1", source=snapshot)
    assert status == 0, said


def test_a_snapshot_away_from_its_run_is_searched_but_not_drawn(
    search: Search, trained: Path, tmp_path: Path
) -> None:
    query = trained.parent / "train" / "red" / "3.png"
    _, within = search(query, "--k", "3")
    shutil.copytree(trained / "snapshots", tmp_path / "away")
    (tmp_path / "drawn.png").unlink()
    status, said = search(query, "--k", "3", source=tmp_path / "away")
    assert status == 0, said
    lines = [[line for line in each.splitlines() if "(row" in line] for each in (within, said)]
    assert lines[0] == lines[1]
    assert "not drawn" in said
    assert not (tmp_path / "drawn.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "do not exist"), (b"no image", "not an image"), ("cut", "cannot be decoded")],
)
def test_an_unreadable_image(
    search: Search, trained: Path, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    query = tmp_path / "query.png"
    if content == "cut":
        whole = (trained.parent / "train" / "red" / "0.png").read_bytes()
        query.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        query.write_bytes(content)
    status, said = search(query)
    assert status == 2, said
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "31"], "k is 31"),
        (["--k", "0"], "at least 1"),
        ([], "name an image"),
        (["--output", "/nowhere/search.png"], "there is no folder /nowhere: make it"),
    ],
)
def test_bad_settings(search: Search, trained: Path, options: list[str], message: str) -> None:
    images = [trained.parent / "train" / "red" / "0.png"] if options else []
    status, said = search(*images, *options)
    assert status == 2, said
    assert message in " ".join(said.replace("│", " ").split())


def test_no_run(search: Search, trained: Path, tmp_path: Path) -> None:
    status, said = search(trained.parent / "train" / "red" / "0.png", source=tmp_path / "nothing")
    assert status == 2, said
    assert "error: " in said
