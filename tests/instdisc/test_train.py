"""The training program in this process: what it leaves behind, and what it says to bad input."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from instdisc.recipes import RECIPES
from instdisc.run_directory import RunDirectory
from instdisc.train import main, parse
from pipelines.manifest import Manifest

SMALL = [
    "--num-workers",
    "0",
    "--training.epochs",
    "2",
    "--training.batch-size",
    "8",
    "--backbone.embedding-dim",
    "16",
]
SMALL += ["--objective.num-negatives", "32", "--probe.neighbours", "5", "--optimizer.warmup-epochs", "0"]

Run = Callable[..., tuple[int, str, Path]]


@pytest.fixture
def run(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run `sample` with other images; returns status, everything it said, and the run directory."""
    monkeypatch.chdir(tmp_path)

    def run(images: Path, *more: str, test: Path | None = None) -> tuple[int, str, Path]:
        where = ["--data.path", str(images), "--data.test-path", str(test), "--run-dir", "out"]
        try:
            status = main(["sample", *SMALL, *where, *more])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capfd.readouterr()
        return status, captured.out + captured.err + caplog.text, tmp_path / "out"

    return run


def picture(number: int, size: int = 36) -> Image.Image:
    generator = np.random.default_rng(number)
    small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size))


def write_pictures(folder: Path, count: int, classes: int = 0) -> Path:
    for number in range(count):
        place = folder / f"class{number % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:03}.png")
    return folder


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


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
    for text in ("raw pixels", "untrained network", "run directory", "next:"):
        assert text in said
    bank = zarr.open_array(out / "bank.zarr", mode="r")
    manifest = Manifest.load(out / "manifest")
    assert bank.shape == (45, 16)
    assert bank.attrs["manifest_fingerprint"] == manifest.fingerprint
    np.testing.assert_allclose(np.linalg.norm(bank[:], axis=1), 1, atol=1e-6)
    network = RunDirectory(out).load_network()
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


def test_bank_rows_of_trained_images_have_moved(run: Run, tmp_path: Path) -> None:
    from instdisc.bank import random_unit_rows

    _, said, out = run(write_pictures(tmp_path / "train", 17), "--training.epochs", "1")
    moved = ~np.isclose(
        zarr.open_array(out / "bank.zarr", mode="r")[:], random_unit_rows(0, 17, 16, seed=0)
    ).all(axis=1)
    assert moved.sum() == 16, said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_banks_are_saved(run: Run, tmp_path: Path, dtype: str) -> None:
    status, said, out = run(write_pictures(tmp_path / "train", 20), "--bank.dtype", dtype)
    assert status == 0, said
    bank = zarr.open_array(out / "bank.zarr", mode="r")
    assert bank.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_allclose(np.linalg.norm(bank[:].astype(np.float32), axis=1), 1, atol=2e-2)


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


def solid(folder: Path, classes: dict[str, tuple[int, int, int]], count: int) -> Path:
    """Images whose class is their colour, up to a little noise."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def test_classes_are_matched_by_name(run: Run, tmp_path: Path) -> None:
    """The test folder lacks the first class, so its own numbers would all be wrong, and has one of its own."""
    train = solid(tmp_path / "train", {"a": RED, "b": GREEN, "c": BLUE}, 8)
    status, said, out = run(train, test=solid(tmp_path / "test", {"b": GREEN, "c": BLUE, "d": RED}, 4))
    assert status == 0, said
    assert summary_of(out)["knn_top1_raw_pixels"] == pytest.approx(2 / 3)
    assert "1 classes of the test images are not in training, e.g. d" in said


def test_no_class_in_common(run: Run, tmp_path: Path) -> None:
    train = solid(tmp_path / "train", {"a": RED, "b": GREEN}, 5)
    refused(
        run(train, test=solid(tmp_path / "test", {"0": RED, "1": GREEN}, 2)), "none of the classes", "by name"
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


@pytest.mark.parametrize("options", [["--training.accumulation", "2"], ["--loader.backend", "host"]])
def test_options(run: Run, tmp_path: Path, options: list[str]) -> None:
    status, said, _ = run(write_pictures(tmp_path / "train", 20), *options)
    assert status == 0, said


@pytest.mark.usefixtures("run")
def test_the_softmax_over_all_images_trains(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 45, classes=3)
    small = [option for option in SMALL if option not in ("--objective.num-negatives", "32")]
    options = ["--augmentation.image-size", "16", "--backbone.name", "resnet8", "--data.test-path", "None"]
    status = main(["cifar10-softmax", *small, *options, "--data.path", str(images), "--run-dir", "out"])
    assert status == 0
    assert summary_of(tmp_path / "out")["recipe"] == "cifar10-softmax"


def test_two_runs_of_one_seed_are_the_same(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 20, classes=2)
    banks = []
    for _ in range(2):
        status, said, out = run(images, "--overwrite")
        assert status == 0, said
        banks.append(zarr.open_array(out / "bank.zarr", mode="r")[:])
    assert np.array_equal(*banks)


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(result: tuple[int, str, Path], *texts: str) -> None:
    status, said, _ = result
    assert status == 2, said
    assert "Traceback" not in said
    for text in texts:
        assert text in said


def test_no_such_path(run: Run, tmp_path: Path) -> None:
    refused(run(tmp_path / "nowhere"), "--data.path: ", "nowhere")
    refused(run(write_pictures(tmp_path / "train", 20), test=tmp_path / "elsewhere"), "elsewhere")


def test_an_empty_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty"), "no images found", "empty")


def test_fewer_images_than_a_batch(run: Run, tmp_path: Path) -> None:
    refused(run(write_pictures(tmp_path / "train", 7)), "7 images", "batch of 8", "--training.batch-size")


def test_unknown_recipe_option_backbone_and_values(run: Run, tmp_path: Path) -> None:
    assert main(["simple"]) == 2
    images = write_pictures(tmp_path / "train", 20)
    refused(run(images, "--no-such-option", "1"), "no-such-option")
    refused(run(images, "--backbone.name", "resnet19"), "resnet19", "did you mean", "resnet18")
    refused(run(images, "--backbone.name", "vit_b_16"), "32 pixels")
    refused(run(images, "--objective.temperature", "0"), "temperature")
    refused(run(images, "--bank.momentum", "1.5"), "momentum")
    refused(run(images, "--training.epochs", "0"), "epochs")
    refused(run(images, "--augmentation.crop-scale", "0", "1"), "crop_scale")


def test_a_recipes_test_images_are_for_its_training_images() -> None:
    assert parse(["sample"])[1].data.test_path == "sample:test"
    assert parse(["sample", "--data.path", "mine"])[1].data.test_path is None
    assert parse(["sample", "--data.path", "mine", "--data.test-path", "other"])[1].data.test_path == "other"


def test_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for recipe in RECIPES:
        assert recipe in said
        parse([recipe])


def test_a_batch_that_the_parts_do_not_divide(run: Run, tmp_path: Path) -> None:
    refused(
        run(write_pictures(tmp_path / "train", 20), "--training.accumulation", "3"),
        "batch of 8",
        "multiple of 3",
    )


def test_test_images_without_labels(run: Run, tmp_path: Path) -> None:
    train, test = write_pictures(tmp_path / "train", 20, classes=2), write_pictures(tmp_path / "test", 4)
    refused(run(train, test=test), "no test image has a label")


@pytest.mark.parametrize("verify", [False, True])
def test_broken_images_are_named_and_the_run_goes_on(run: Run, tmp_path: Path, verify: bool) -> None:
    images = write_pictures(tmp_path / "train", 24, classes=2)
    (images / "class0" / "000.png").write_bytes(b"")
    (images / "class0" / "002.png").write_text("no image at all")
    whole = (images / "class1" / "001.png").read_bytes()
    (images / "class1" / "001.png").write_bytes(whole[: len(whole) // 2])
    status, said, out = run(images, "--data.verify" if verify else "--data.no-verify")
    assert status == 0, said
    named = {json.loads(line)["name"] for line in (out / "corrupt_images.jsonl").read_text().splitlines()}
    assert named == {str(images / name) for name in ("class0/000.png", "class0/002.png", "class1/001.png")}
    for name in named:
        assert name in said
    assert summary_of(out)["num_instances"] == (21 if verify else 22)
    assert summary_of(out)["corrupt_images"] == 3


def test_images_of_every_mode_are_converted(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 16)
    for mode, name in {"L": "grey.png", "RGBA": "alpha.png", "P": "palette.png", "CMYK": "print.jpg"}.items():
        picture(50).convert(mode).save(images / name)
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40).save(images / "deep.png")
    frames = [picture(number) for number in range(3)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    picture(1, size=1).save(images / "dot.png")
    status, said, out = run(images)
    assert status == 0, said
    assert summary_of(out)["num_instances"] == 23
    assert summary_of(out)["corrupt_images"] == 0, said


def test_a_directory_with_another_run_is_left_alone(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 20)
    assert run(images)[0] == 0
    before = (tmp_path / "out" / "summary.json").read_text()
    refused(
        run(images, "--training.seed", "5"), "another configuration", "training.seed is 0 there and 5 here"
    )
    refused(run(images), "already holds a run", "--overwrite")
    refused(run(images, "--overwrite", "--training.accumulation", "3"), "multiple of 3")
    refused(run(tmp_path / "nowhere", "--overwrite"), "nowhere")
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert (tmp_path / "out" / "bank.zarr").exists()
    status, said, out = run(images, "--overwrite", "--training.seed", "5")
    assert status == 0, said
    assert summary_of(out)["seed"] == 5


def test_files_that_are_no_runs_are_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "manifest").mkdir(parents=True)
    (tmp_path / "out" / "manifest" / "precious").write_text("mine")
    images = write_pictures(tmp_path / "train", 20)
    refused(run(images), "in the way", "--overwrite")
    assert (tmp_path / "out" / "manifest" / "precious").read_text() == "mine"


def test_a_second_run_in_the_same_directory_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    images = write_pictures(tmp_path / "train", 20)
    with (tmp_path / "out" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run(images, "--overwrite"), "another run is writing")
    assert run(images)[0] == 0


def test_broken_images_of_one_name_in_both_sets_are_two(run: Run, tmp_path: Path) -> None:
    places = [write_pictures(tmp_path / part, 20, classes=2) for part in ("train", "test")]
    for place in places:
        whole = (place / "class0" / "000.png").read_bytes()
        (place / "class0" / "000.png").write_bytes(whole[: len(whole) // 2])
    status, said, out = run(places[0], test=places[1])
    assert status == 0, said
    assert summary_of(out)["corrupt_images"] == 2


def test_a_file_where_the_run_directory_should_be(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(run(write_pictures(tmp_path / "train", 20)), "cannot write to run directory", "--run-dir")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_there(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "train", 20)
    result = run(images, "--optimizer.learning-rate", "1e30", "--optimizer.schedule", "steps")
    refused(result, "not finite", "step ", "learning-rate")
    out = result[2]
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    bank = zarr.open_array(out / "bank.zarr", mode="r")[:]
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-5)
    assert not (out / "summary.json").exists()
