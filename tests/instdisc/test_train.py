"""The training program in this process: what it leaves behind, and that it measures what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import instdisc
from instdisc import search
from instdisc.model.bank import random_unit_rows
from instdisc.runs.run_directory import RunDirectory
from instdisc.train import main
from pipelines.manifest import Manifest
from tests.instdisc.program import (
    BLUE,
    GREEN,
    RED,
    SMALL,
    Run,
    bank_of,
    refused,
    solid,
    summary_of,
    write_pictures,
)


def test_a_folder_with_splits_trains_on_one_and_measures_on_the_other(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "images" / "train", 24, classes=2)
    write_pictures(tmp_path / "images" / "Val", 6, classes=2)
    (tmp_path / "images" / "readme.txt").write_text("about")
    status, said, out = run(tmp_path / "images", "--training.epochs", "1")
    assert status == 0, said
    summary = summary_of(out)
    assert (summary["num_instances"], summary["knn_protocol"]) == (24, "test-set")
    assert len(Manifest.load(out / "test_manifest")) == 6
    assert "training on train and measuring on Val, which hold the same classes" in said


def test_names_that_are_not_utf8_train_and_are_searched(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_pictures(tmp_path / "images", 16, classes=2)
    names = [os.fsdecode(b"caf\xe9.png"), "a\nb.png", "c,d.png"]
    for number, name in enumerate(names):
        (images / "class0" / f"{2 * number:03}.png").rename(images / "class0" / name)
    (images / "class1").rename(images / os.fsdecode(b"\xff"))
    status, said, out = run(images, "--training.epochs", "1")
    assert status == 0, said
    keys = RunDirectory(out).open_snapshot().read("keys").tolist()
    assert keys[:3] == ["class0/006.png", "class0/008.png", "class0/010.png"]
    assert {"class0/caf\\xe9.png", "class0/a\\nb.png", "class0/c,d.png"} < set(keys)
    assert Manifest.load(out / "manifest").keys[keys.index("class0/caf\\xe9.png")] == f"class0/{names[0]}"
    capfd.readouterr()
    queries = [str(images / "class0" / name) for name in (*names, names[0])]
    drawn = tmp_path / "found.png"
    assert search.main([str(out), *queries, "--k", "2", "--num-actors", "0", "--output", str(drawn)]) == 0
    assert capfd.readouterr().out.count("class0/caf\\xe9.png\n") == 2
    assert drawn.exists()


def test_a_run_leaves_everything_behind(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 45, classes=3)
    test = write_pictures(tmp_path / "test", 12, classes=3)
    status, said, out = run(images, test=test)
    assert status == 0, said
    summary = summary_of(out)
    assert summary["recipe"] == "sample"
    assert (summary["num_instances"], summary["world_size"], summary["steps"]) == (45, 1, 10)
    for name in (
        "knn_top1",
        "knn_top1_bank",
        "knn_top1_raw_pixels",
        "knn_top1_untrained",
        "loader_wait_fraction",
    ):
        assert 0 <= summary[name] <= 1
    assert summary["train_seconds"] > 0
    assert summary["images_per_second"] > 0
    assert summary["knn_protocol"] == "test-set"
    for text in ("raw pixels", "untrained network", "run directory", "next:", "train sample --help"):
        assert text in said
    assert f"--output indexes/{out.name} " in said
    snapshot, manifest = RunDirectory(out).open_snapshot(), Manifest.load(out / "manifest")
    assert snapshot.step == 10
    assert snapshot.attributes["manifest_fingerprint"] == manifest.fingerprint
    assert snapshot.attributes["class_names"] == list(manifest.class_names)
    bank = snapshot.read("embeddings")
    assert bank.shape == (45, 16)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(snapshot.read("labels"), manifest.labels)
    assert list(snapshot.read("keys")) == list(manifest.keys)
    network = instdisc.open_run(out).network()
    with torch.no_grad():
        torch.testing.assert_close(network(torch.randn(2, 3, 32, 32)).norm(dim=1), torch.ones(2))
    config = json.loads((out / "config.json").read_text())
    assert (config["recipe"], config["training"]["batch_size"], config["launch"]["num_workers"]) == (
        "sample",
        8,
        0,
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 10]
    assert all(np.isfinite(row["loss"]) for row in rows if row["kind"] == "train")
    assert not (out / ".next").exists()


@pytest.mark.parametrize(("rate", "expected"), [("0.01", 0), ("1e30", 2)])
def test_targets_of_ranks_that_were_killed_go_with_the_run(
    run: Run, tmp_path: Path, rate: str, expected: int
) -> None:
    targets = RunDirectory(tmp_path / "out").targets
    targets.mkdir(parents=True)
    for name in ("rank-0.json", "rank-12.json", "evaluation-0.json"):
        (targets / name).write_text("[]")
    status, said, _ = run(write_pictures(tmp_path / "train", 20), "--optimizer.learning-rate", rate)
    assert status == expected, said
    assert [path.name for path in targets.iterdir()] == ["evaluation-0.json"]


@pytest.mark.parametrize(("negatives", "said"), [("20", False), ("50", True)])
def test_more_negatives_than_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, negatives: str, said: bool
) -> None:
    images = write_pictures(tmp_path / "train", 20)
    arguments = ["cifar10-npid", *SMALL, "--data.path", str(images), "--data.test-path", "None"]
    arguments += ["--backbone.name", "resnet8", "--augmentation.image-size", "16"]
    arguments += ["--objective.num-negatives", negatives, "--run-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    warning = (
        "drawing 50 negatives from only 20 images: each image is used 2.5 times per step on average; lower"
    )
    assert (warning in caplog.text) == said


def test_bank_rows_of_trained_images_have_moved(run: Run, tmp_path: Path) -> None:
    _, said, out = run(write_pictures(tmp_path / "train", 17), "--training.epochs", "1")
    moved = ~np.isclose(bank_of(out), random_unit_rows(0, 17, 16, seed=0)).all(axis=1)
    assert moved.sum() == 16, said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_banks_are_saved(run: Run, tmp_path: Path, dtype: str) -> None:
    status, said, out = run(write_pictures(tmp_path / "train", 20), "--bank.dtype", dtype)
    assert status == 0, said
    assert RunDirectory(out).open_snapshot().tables["embeddings"] == ((20, 16), dtype)
    np.testing.assert_allclose(np.linalg.norm(bank_of(out).astype(np.float32), axis=1), 1, atol=2e-2)


def test_without_a_test_set_training_images_classify_each_other(run: Run, tmp_path: Path) -> None:
    status, said, out = run(write_pictures(tmp_path / "train", 20, classes=2))
    assert status == 0, said
    assert summary_of(out)["knn_protocol"] == "leave-one-out"
    assert summary_of(out)["knn_top1"] is not None


def test_without_labels_training_works_and_knn_is_skipped(run: Run, tmp_path: Path) -> None:
    status, said, out = run(write_pictures(tmp_path / "train", 20))
    assert status == 0, said
    assert "kNN accuracy is skipped" in said
    assert summary_of(out)["knn_top1"] is None
    assert summary_of(out)["knn_top1_raw_pixels"] is None


def test_classes_are_matched_by_name(run: Run, tmp_path: Path) -> None:
    """The test folder lacks the first class, so its own numbers would all be wrong, and has one of its own."""
    train = solid(tmp_path / "train", {"a": RED, "b": GREEN, "c": BLUE}, 8)
    status, said, out = run(train, test=solid(tmp_path / "test", {"b": GREEN, "c": BLUE, "d": RED}, 4))
    assert status == 0, said
    assert summary_of(out)["knn_top1_raw_pixels"] == pytest.approx(2 / 3)
    assert "1 classes of the test images are not among the training classes, e.g. d" in said


def test_no_class_in_common(run: Run, tmp_path: Path) -> None:
    train = solid(tmp_path / "train", {"a": RED, "b": GREEN}, 5)
    refused(
        run(train, test=solid(tmp_path / "test", {"0": RED, "1": GREEN}, 2)),
        "none of the training images' classes",
        "by name",
    )


def test_the_probe_sees_plain_images(run: Run, tmp_path: Path) -> None:
    """kNN on raw pixels, worked out here from the files."""
    images = write_pictures(tmp_path / "train", 30, classes=3)
    names = sorted(images.rglob("*.png"))
    for name in names:
        Image.open(name).resize((32, 32)).save(name)
    status, said, out = run(images, "--loader.backend", "host")
    assert status == 0, said
    mean, std = (np.array(values) for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    pixels = np.stack(
        [((np.asarray(Image.open(name)) / 255 - mean) / std).transpose(2, 0, 1).ravel() for name in names]
    )
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    labels = np.array([int(name.parent.name[-1]) for name in names])
    similarity = pixels @ pixels.T - 4 * np.eye(30)
    correct = []
    for row, label in zip(similarity, labels, strict=True):
        nearest = np.argsort(-row)[:5]
        votes = np.bincount(labels[nearest], np.exp(row[nearest] / 0.07), minlength=3)
        correct.append(votes.argmax() == label)
    assert summary_of(out)["knn_top1_raw_pixels"] == pytest.approx(np.mean(correct))


def test_the_rate_follows_its_schedule(run: Run, tmp_path: Path) -> None:
    options = [
        "--training.log-every",
        "1",
        "--optimizer.warmup-epochs",
        "1",
        "--optimizer.learning-rate",
        "0.02",
    ]
    status, said, out = run(write_pictures(tmp_path / "train", 20), *options)
    assert status == 0, said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.01])


@pytest.mark.parametrize("options", [["--objective.form", "paper"], ["--loader.backend", "host"]])
def test_options(run: Run, tmp_path: Path, options: list[str]) -> None:
    status, said, _ = run(write_pictures(tmp_path / "train", 20), *options)
    assert status == 0, said


@pytest.mark.usefixtures("run")
def test_the_softmax_over_all_images_trains(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 45, classes=3)
    options = ["--augmentation.image-size", "16", "--backbone.name", "resnet8", "--data.test-path", "None"]
    options += ["--training.accumulation", "2"]
    status = main(["cifar10-softmax", *SMALL, *options, "--data.path", str(images), "--run-dir", "out"])
    assert status == 0
    assert summary_of(tmp_path / "out")["recipe"] == "cifar10-softmax"


def test_two_runs_of_one_seed_are_the_same(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 20, classes=2)
    banks = []
    for _ in range(2):
        status, said, out = run(images, "--overwrite")
        assert status == 0, said
        banks.append(bank_of(out))
    assert np.array_equal(*banks)
