"""What the training program says to bad input, and that nothing is lost by it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import instdisc
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.recipes import RECIPES
from instdisc.train import main, parse
from tests.instdisc.program import (
    Run,
    bank_of,
    picture,
    refused,
    summary_of,
    write_pictures,
)


def test_no_such_path(run: Run, tmp_path: Path) -> None:
    refused(run(tmp_path / "nowhere"), "--data.path: ", "nowhere")
    refused(run(write_pictures(tmp_path / "train", 20), test=tmp_path / "elsewhere"), "elsewhere")


def test_a_path_with_nothing_there_is_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where no cluster answers
    images = write_pictures(tmp_path / "train", 8)
    options = ["--run-dir", str(tmp_path / "out"), "--training.batch-size", "8"]
    nowhere = str(tmp_path / "nowhere")
    for paths in ([nowhere], [str(images), "--data.test-path", nowhere]):
        assert main(["sample", *options, "--data.path", *paths]) == 2
        assert f"nothing at {nowhere}" in capsys.readouterr().err


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
    refused(run(images, "--objective.temperature", "0"), "error: --objective.temperature is 0.0, expected")
    refused(run(images, "--bank.momentum", "1.5"), "error: --bank.momentum is 1.5, expected")
    refused(run(images, "--training.epochs", "0"), "error: --training.epochs is 0, expected at least 1")
    refused(
        run(images, "--augmentation.crop-scale", "0", "1"), "error: --augmentation.crop-scale is (0.0, 1.0)"
    )


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
    for mode, name in {"L": "gray.png", "RGBA": "alpha.png", "P": "palette.png", "CMYK": "print.jpg"}.items():
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
    refused(run(images, "--training.seed", "5"), "another run", "training.seed is 0 there and 5 here")
    refused(run(images, "--backbone.name", "resnet20"), "'resnet8' there and 'resnet20' here")
    refused(
        run(write_pictures(tmp_path / "other", 21)), "the images are 20 with", "and 21 with", "--overwrite"
    )
    status, said, _ = run(images)
    assert status == 0, said
    assert "complete" in said
    refused(run(images, "--overwrite", "--training.accumulation", "3"), "multiple of 3")
    refused(run(tmp_path / "nowhere", "--overwrite"), "nowhere")
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert len(bank_of(tmp_path / "out")) == 20
    status, said, out = run(images, "--overwrite", "--training.seed", "5")
    assert status == 0, said
    assert summary_of(out)["seed"] == 5


def test_files_that_are_no_runs_are_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "manifest").mkdir(parents=True)
    (tmp_path / "out" / "manifest" / "precious").write_text("mine")
    images = write_pictures(tmp_path / "train", 20)
    refused(run(images), "not part of a run", "--overwrite")
    assert (tmp_path / "out" / "manifest" / "precious").read_text() == "mine"


def test_a_second_run_in_the_same_directory_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    images = write_pictures(tmp_path / "train", 20)
    with (tmp_path / "out" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run(images, "--overwrite"), "another run is writing")
    assert run(images)[0] == 0


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [
        (errno.EWOULDBLOCK, 2, "another run is writing"),
        (errno.EACCES, 2, "another run is writing"),
        (errno.ENOLCK, 0, ""),  # a lease takes the place of the lock
        (errno.ENOSYS, 0, ""),
        (errno.ENOTSUP, 0, ""),
        (errno.EIO, 2, "cannot lock"),
        (errno.EPERM, 2, "cannot lock"),
    ],
)
def test_a_lock_that_cannot_be_had(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, text: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    got, said, _ = run(write_pictures(tmp_path / "train", 20), "--training.epochs", "1")
    assert got == status, said
    assert text in said


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
    bad = int(re.search(r"step (\d+): ", result[1])[1])  # found out a step later
    assert RunDirectory(out).open_snapshot().step == bad - 1
    weights = instdisc.open_run(out).network().state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    np.testing.assert_allclose(np.linalg.norm(bank_of(out), axis=1), 1, atol=1e-5)
    assert not (out / "summary.json").exists()
