"""kNN accuracy of few images: training, evaluation and the report say the same, with what it rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instdisc.evaluate import main as evaluate
from tests.instdisc.program import Run, solid, summary_of
from tests.instdisc.test_evaluate import CLASSES


def noisy(folder: Path, counts: dict[str, int], *, contrast: int, seed: int) -> Path:
    """Noise around a gray that is a little lighter for each further class."""
    generator = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = 90 + contrast * number + generator.integers(-80, 80, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{image}.png")
    return folder


def evaluated(run: Path, *options: str) -> dict[str, Any]:
    """`knn.json` of an evaluation in this process."""
    where = ["--output", str(run.parent / "evaluated"), "--num-actors", "0"]
    assert evaluate([str(run), *where, *options]) == 0
    found: dict[str, Any] = json.loads((run.parent / "evaluated" / "knn.json").read_text())
    return found | found["accuracies"][f"k{found['k']}"]


@pytest.mark.parametrize("test_set", [False, True])
@pytest.mark.parametrize(("counts", "seed"), [({"a": 30, "b": 30}, 0), ({"a": 40, "b": 12, "c": 5}, 1)])
def test_evaluation_prints_what_training_measured(
    run: Run, tmp_path: Path, counts: dict[str, int], seed: int, test_set: bool
) -> None:
    """To the last digit, in the precision that training takes by itself, with a bank of half precision too."""
    images = noisy(tmp_path / "train", counts, contrast=4, seed=seed)
    test = noisy(tmp_path / "test", dict.fromkeys(counts, 20), contrast=4, seed=9) if test_set else None
    status, said, out = run(
        images, "--bank.dtype", ("float32", "float16")[seed], "--knn.k", "None", test=test
    )
    assert status == 0, said
    summary = summary_of(out)
    for more, end in (([], "_bank"), (["--recompute"], "")):
        found = evaluated(out, *more)
        assert found["top1"] == summary[f"knn_top1{end}"]
        assert found["balanced"] == summary[f"knn_balanced{end}"]
        assert (found["k"], found["rows"]) == (summary[f"knn_k{end}"], summary["knn_rows"])
        assert found["queries"] == summary["knn_queries"]
    for name in ("whitened", "features"):
        assert found[name]["top1"] == pytest.approx(summary[f"knn_top1_{name}"], abs=1.5 / found["queries"])
    chosen = "knn_top1" + ("" if summary["readout"] == "plain" else f"_{summary['readout']}")
    assert summary["knn_top1_readout"] == summary[chosen]
    assert f"the training images alone choose to read out: {summary['readout']}" in said
    assert summary["knn_top1_untrained_features"] is not None
    for name in (
        "raw pixels, whitened",
        "untrained network, whitened",
        "trained, whitened",
        "trained, features",
    ):
        assert name in said
    k = 3 * (min(counts.values()) - (not test_set)) // 2
    assert summary["knn_k"] == k
    assert f"k = {k}, {sum(counts.values())} labeled rows" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {each["kind"]: each for each in lines}
    assert (measured["baselines"]["k_raw_pixels"], measured["knn"]["k_recomputed"]) == (k, k)
    assert f"(k = {k}, balanced " in said


def test_noise_is_at_chance(run: Run, tmp_path: Path) -> None:
    """Leaving the query alone out, with as many neighbors as there are rows, gives 0% here."""
    images = noisy(tmp_path / "train", {"a": 48, "b": 48}, contrast=0, seed=3)
    status, said, out = run(images, "--knn.k", "None")
    assert status == 0, said
    for name in ("knn_top1", "knn_top1_untrained", "knn_top1_raw_pixels"):
        assert 0.3 < summary_of(out)[name] < 0.7, name  # two standard deviations are 0.12


def test_only_labeled_images_vote(run: Run, tmp_path: Path) -> None:
    """As in STL-10: few of the images that are trained on have a label."""
    solid(tmp_path / "train", {**CLASSES, "none": (200, 40, 40)}, 8)
    listing = tmp_path / "list.csv"
    names = sorted((tmp_path / "train").rglob("*.png"))
    labels = [name.parent.name if name.parent.name != "none" else "" for name in names]
    listing.write_text("".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True)))
    test = solid(tmp_path / "test", {"red": CLASSES["red"], "blue": CLASSES["blue"], "gray": (90, 90, 90)}, 4)
    status, said, out = run(listing, "--knn.k", "None", "--data.verify", test=test)
    assert status == 0, said
    summary = summary_of(out)
    assert (summary["num_instances"], summary["knn_rows"], summary["knn_k"]) == (32, 24, 12)
    assert (summary["knn_queries"], summary["knn_unknown_classes"], summary["knn_without_neighbor"]) == (
        12,
        4,
        0,
    )
    assert summary["knn_top1_raw_pixels"] == pytest.approx(8 / 12)
    assert summary["knn_balanced_raw_pixels"] == pytest.approx(2 / 3)
    assert "4 test images of classes that no training image has count as wrong" in said
    assert "4 queries are of classes that no training image has: they count as wrong" in said
    for more, end in (([], "_bank"), (["--recompute"], "")):
        found = evaluated(out, *more)
        assert (found["top1"], found["rows"]) == (summary[f"knn_top1{end}"], 24)


def test_queries_without_a_neighbor_are_wrong(run: Run, tmp_path: Path) -> None:
    """Every class has one image: with it left out nothing of its class, nor of any other, is left."""
    images = noisy(tmp_path / "train", {f"class{number:02}": 1 for number in range(16)}, contrast=4, seed=0)
    status, said, out = run(images, "--knn.k", "None")
    assert status == 0, said
    summary = summary_of(out)
    assert (summary["knn_top1"], summary["knn_without_neighbor"], summary["knn_k"]) == (0, 16, 1)
    found = evaluated(out)
    assert (found["top1"], found["without_neighbor"]) == (0, 16)


def test_many_images_are_sampled(run: Run, tmp_path: Path) -> None:
    images = noisy(tmp_path / "train", {"a": 30, "b": 30}, contrast=4, seed=0)
    status, said, out = run(images, "--knn.k", "None", "--knn.max-rows", "20")
    assert status == 0, said
    summary = summary_of(out)
    assert (summary["knn_rows"], summary["knn_queries"], summary["knn_k_bank"]) == (20, 20, 43)
    assert summary["knn_k"] < 15
    assert "20 images drawn from the 60 labeled training images" in said
    for more, end in (([], "_bank"), (["--recompute"], "")):
        found = evaluated(out, "--max-rows", "20", *more)
        assert (found["top1"], found["k"]) == (summary[f"knn_top1{end}"], summary[f"knn_k{end}"])
