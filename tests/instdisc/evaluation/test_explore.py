"""What is found in a collection: by formulas in float64 on small arrays, and end to end in a run and in indexes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from cluster import lease
from instdisc.common.errors import ConfigError
from instdisc.embed import main as embed
from instdisc.evaluation.clusters import spherical_k_means
from instdisc.evaluation.correlation import GRAY_SIDE, correlations
from instdisc.evaluation.duplicates import group_rows, kept_first, pairs_of
from instdisc.evaluation.image_tables import write_table
from instdisc.evaluation.source import ArrayRows
from instdisc.evaluation.strangers import fit
from instdisc.evaluation.tsne import places_of
from instdisc.explore import main
from instdisc.explore import parse as parse_options
from instdisc.settings.evaluation import MapConfig
from tests.instdisc.program import write_pictures

HERE = ["--num-actors", "0", "--loader.threads", "1", "--loader.backend", "host"]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """A table, after a look at whether both forms of it say the same."""
    table = pq.read_table(file.with_suffix(".parquet")).to_pylist()
    with file.with_suffix(".csv").open(newline="") as text:
        written = list(csv.DictReader(text))
    assert [row["key"] for row in written] == [row["key"] for row in table]
    return table


@pytest.fixture
def index(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make an index of the images of a folder."""
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)

    def index(images: Path) -> str:
        place = str(tmp_path / "index")
        assert embed([str(trained), "--data.path", str(images), "--output", place, *HERE]) == 0
        return place

    return index


def test_tables_in_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum\xe9"))
    folder.mkdir()
    write_table(folder / "found", {"key": ["a"], "key_bytes": pa.array([b"a"], pa.binary())})
    assert sorted(path.name for path in folder.iterdir()) == ["found.csv", "found.parquet"]


def test_groups_are_connected_components() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 7, 40):
        vectors = generator.normal(size=(count, 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        similar = vectors @ vectors.T
        np.fill_diagonal(similar, -np.inf)
        rows = np.argsort(-similar, axis=1)[:, : count - 1]
        scores = np.take_along_axis(similar, rows, 1).astype(np.float32)
        found = group_rows(*pairs_of(scores, rows, 0.9), count)
        reached = (similar >= 0.9) | np.eye(count, dtype=bool)
        for _ in range(count):
            reached = reached @ reached
        alone = reached.sum(axis=1) == 1
        np.testing.assert_array_equal(found == -1, alone)
        together = (found[:, None] == found) & ~alone[:, None]
        np.testing.assert_array_equal(together, reached & ~alone[:, None])
        sizes = np.bincount(found[found >= 0]) if not alone.all() else np.array([], int)
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


def test_missing_neighbors_join_nothing() -> None:
    scores = np.array([[0.99, -np.inf], [0.99, -np.inf], [-np.inf, -np.inf]], np.float32)
    pairs = pairs_of(scores, np.array([[1, -1], [0, -1], [-1, -1]]), -1)
    assert group_rows(*pairs, 3).tolist() == [0, 0, -1]


def test_the_largest_picture_then_the_largest_file_then_the_first_is_kept() -> None:
    group = np.array([1, 0, 1, 0, 0, 1])
    pixels = np.array([4, 9, 4, 9, 16, 4])
    order, keep = kept_first(group, pixels, np.array([5, 1, 7, 1, 1, 7]))
    assert order.tolist() == [4, 1, 3, 2, 5, 0]
    assert keep.tolist() == [True, False, False, True, False, False]


def test_copies_correlate_and_other_pictures_do_not() -> None:
    generator = np.random.default_rng(1)
    drawn = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).resize((100, 100))
    other = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).resize((100, 100))
    copies = [
        drawn,
        drawn.resize((50, 50)),
        drawn.crop((10, 10, 90, 90)),
        drawn.crop((0, 20, 80, 100)),
        ImageOps.mirror(drawn.crop((20, 0, 100, 80))),
        drawn.point(lambda value: value // 2 + 30),
        other,
        ImageOps.mirror(other),
        Image.new("L", (100, 100), 200),
    ]
    small = [np.asarray(each.resize((GRAY_SIDE, GRAY_SIDE), Image.Resampling.BOX)) for each in copies]
    first = np.zeros(len(copies), np.int64)
    second = np.arange(len(copies))
    found = correlations(np.stack(small).reshape(len(copies), -1), first, second)
    assert (found[:6] > 0.9).all(), found
    assert (found[6:] < 0.8).all(), found
    assert found[8] == 0
    np.testing.assert_allclose(correlations(np.stack(small).reshape(len(copies), -1), second, first), found)
    assert correlations(np.stack(small), first[:0], second[:0]).tolist() == []


def test_strangeness_is_the_distance_in_the_leading_components_of_every_stage() -> None:
    generator = np.random.default_rng(3)
    means = (generator.normal(size=(300, 30)) @ generator.normal(size=(30, 30))).astype(np.float32)
    means[:, 20:] *= 1000  # the scale of a stage does not matter
    means[7] = np.nan
    found = fit(means, [20, 10]).of(torch.from_numpy(means)).numpy()
    there = np.delete(means, 7, axis=0).astype(np.float64)
    squares = []
    for stage in (slice(0, 20), slice(20, 30)):
        variances, axes = np.linalg.eigh(np.cov(there[:, stage].T, bias=True))
        leading = (there[:, stage] - there[:, stage].mean(axis=0)) @ axes[:, -16:]
        squares.append(leading**2 / variances[-16:])
    expected = np.sqrt(np.concatenate(squares, axis=1).mean(axis=1))
    np.testing.assert_allclose(np.delete(found, 7), expected, rtol=1e-3)
    assert np.isnan(found[7])
    assert (fit(np.ones((3, 4), np.float32), [4]).of(torch.ones(2, 4)) == 0).all()


def test_clusters_are_those_of_the_nearest_centers() -> None:
    generator = np.random.default_rng(2)
    centers = np.eye(4, 8)
    of = generator.integers(0, 4, 101)
    rows = centers[of] + 0.05 * generator.normal(size=(101, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    rows[17] = np.nan
    found = spherical_k_means(ArrayRows(rows), 4, seed=0)
    assert found.cluster_N[17] == -1
    there = np.delete(np.arange(101), 17)
    pairs = {(int(a), int(b)) for a, b in zip(of[there], found.cluster_N[there], strict=True)}
    assert len(pairs) == 4
    assert found.sizes_K.tolist() == sorted(np.bincount(of[there]).tolist(), reverse=True)
    for cluster in range(4):
        members = np.flatnonzero(found.cluster_N == cluster)
        mean = rows[members].astype(np.float64).mean(axis=0)
        expected = rows[members] @ (mean / np.linalg.norm(mean))
        np.testing.assert_allclose(found.similarity_N[members], expected, atol=1e-5)
        assert found.central(cluster, 1)[0] == members[found.similarity_N[members].argmax()]


def test_an_index_with_labels(index: Any, trained: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(trained.parent / "train", tmp_path / "images"))
    original = Image.open(images / "red" / "0.png")
    original.save(images / "red" / "copy.bmp")  # as many pixels in a larger file
    original.resize((64, 64), Image.Resampling.NEAREST).save(images / "red" / "larger.png")
    out = tmp_path / "out"
    few = ["--clusters.counts", "3", "8", "--strangers.count", "5"]
    assert main([index(images), "--output", str(out), *few, *HERE]) == 0
    rows = rows_of(out / "duplicates")
    group = next(row["group"] for row in rows if row["key"].endswith("red/copy.bmp"))
    members = [row for row in rows if row["group"] == group]
    assert [row["keep"] for row in members] == [True] + [False] * (len(members) - 1)
    assert members[0]["width"] == max(row["width"] for row in members)
    assert any(row["key"].endswith("red/0.png") for row in members)
    strangers = rows_of(out / "strangers")
    assert [row["rank"] for row in strangers] == [1, 2, 3, 4, 5]
    assert sorted((row["distance"] for row in strangers), reverse=True) == [
        row["distance"] for row in strangers
    ]
    clusters = rows_of(out / "clusters")
    assert len(clusters) == 32
    assert {row["class"] for row in clusters} == {"red", "green", "blue"}
    nmi = json.loads((out / "clusters.json").read_text())["clusters"]["3"]["nmi"]
    assert 0 <= nmi <= 1
    places = rows_of(out / "map")
    assert [row["key"] for row in places] == [row["key"] for row in clusters]
    assert all(math.isfinite(row["x"] + row["y"]) for row in places)
    page = (out / "index.html").read_text()
    assert page.count('<path class="dots') == 3  # one for each class
    for title in ("Near duplicates", "Strangers, with what is nearest", "3 clusters"):
        assert f"<h2>{title}" in page


def test_an_index_without_labels(index: Any, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 13)
    out = tmp_path / "out"
    assert main([index(images), "--output", str(out), "--clusters.counts", "2", *HERE]) == 0
    assert "class" not in rows_of(out / "clusters")[0]
    assert json.loads((out / "clusters.json").read_text())["clusters"]["2"]["nmi"] is None
    found = json.loads((out / "duplicates.json").read_text())
    assert found["groups"] == 0
    assert "correlation of 0.97" in found["rule"]


def test_near_rows_are_near_on_the_map_and_the_others_are_placed_among_them() -> None:
    generator = np.random.default_rng(4)
    of = np.repeat([0, 1, 2], 20)
    rows = (np.eye(3, 8)[of] + 0.05 * generator.normal(size=(60, 8))).astype(np.float32)
    rows[7] = np.nan
    found, fitted = places_of(ArrayRows(rows), MapConfig(most=31))
    assert 29 <= fitted <= 31
    assert np.isnan(found[7]).all()
    there = np.delete(np.arange(60), 7)
    assert np.isfinite(found[there]).all()
    centers = np.stack([found[there][of[there] == group].mean(axis=0) for group in range(3)])
    distances = np.linalg.norm(found[there][:, None] - centers, axis=2)
    assert (distances.argmin(axis=1) == of[there]).mean() > 0.9
    with pytest.raises(ConfigError, match="fewer than 8 different"):
        places_of(ArrayRows(np.ones((50, 4), np.float32)), MapConfig())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "with --duplicates.threshold, such as 0.95"),
        (["--duplicates.threshold", "0.9"], "give --clusters.counts 2"),
    ],
)
def test_what_is_refused(
    index: Any, tmp_path: Path, options: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Images that moved, and too few for the clusters."""
    images = write_pictures(tmp_path / "images", 9)
    place = index(images)
    images.rename(tmp_path / "elsewhere")
    assert main([place, "--output", str(tmp_path / "out"), *options, *HERE]) == 2
    said = capfd.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_exploring_is_an_evaluation_by_other_protocols() -> None:
    assert parse_options(["INDEX"]).chosen_protocols() == [
        "duplicates",
        "strangers",
        "clusters",
        "map",
        "page",
    ]
