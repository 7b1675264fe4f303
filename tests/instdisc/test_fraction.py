"""Training on a part of the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instdisc import open_run
from instdisc.common.classes import part_of_images
from instdisc.common.errors import ConfigError
from pipelines.build import build_manifest
from tests.instdisc.program import Run, refused, summary_of, write_pictures


def test_parts_are_nested_and_hold_the_same_share_of_every_class(tmp_path: Path) -> None:
    images = build_manifest(write_pictures(tmp_path, 60, classes=3), show_progress=False)
    parts = {share: part_of_images(images, share, seed=1) for share in (0.1, 0.2, 0.55, 1.0)}
    for share, part in parts.items():
        counts = np.bincount(part.labels, minlength=3)
        assert counts.tolist() == [round(20 * share)] * 3
    assert set(parts[0.1].keys) < set(parts[0.2].keys) < set(parts[0.55].keys) < set(parts[1.0].keys)
    assert parts[1.0].fingerprint == images.fingerprint
    assert part_of_images(images, 0.2, seed=1).fingerprint == parts[0.2].fingerprint
    assert part_of_images(images, 0.2, seed=2).fingerprint != parts[0.2].fingerprint
    with pytest.raises(
        ConfigError, match=r"0\.01 takes none of the 20 images of class class0: give at least 0\.05"
    ):
        part_of_images(images, 0.01, seed=1)
    part_of_images(images, 0.05, seed=1)


def test_a_part_of_images_without_labels(tmp_path: Path) -> None:
    images = build_manifest(write_pictures(tmp_path, 30), show_progress=False)
    small, large = (part_of_images(images, share, seed=0) for share in (0.1, 0.5))
    assert (len(small), len(large)) == (3, 15)
    assert set(small.keys) < set(large.keys)
    with pytest.raises(ConfigError, match=r"takes none of the 30 images: give at least 0\.0334"):
        part_of_images(images, 0.001, seed=0)


def test_a_run_on_a_part_keeps_it(run: Run, tmp_path: Path) -> None:
    images, test = write_pictures(tmp_path / "train", 48, classes=2), write_pictures(tmp_path / "test", 6, 2)
    refused(run(images, "--data.fraction", "0"), "data.fraction")
    refused(
        run(images, "--data.fraction", "0.02"),
        "--data.fraction 0.02 takes none of the 24 images of class class0",
    )
    refused(
        run(images, "--data.fraction", "0.1"),
        "holds 4 images with --data.fraction 0.1, fewer than one batch of 8",
    )
    part = ["--data.fraction", "0.5"]
    status, said, out = run(images, *part, "--training.epochs", "1", test=test)
    assert status == 0, said
    assert summary_of(out)["num_instances"] == 24
    opened = open_run(out)
    assert len(opened.keys()) == len(opened.embeddings()) == 24
    refused(
        run(images, "--data.fraction", "0.75", test=test), "the images are 24 with fingerprint", "and 36 with"
    )
    status, said, _ = run(images, *part, "--training.epochs", "1", test=test)
    assert status == 0, said
    assert "is complete" in said
