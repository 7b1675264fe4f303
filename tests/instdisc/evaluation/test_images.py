"""Rows that are computed from images."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from instdisc.evaluation.images import ImageRows, embed
from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.settings import LoaderConfig
from tests.instdisc.program import write_pictures


def test_images_that_changed_are_told_apart_and_not_all_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build_manifest(write_pictures(tmp_path / "images", 16))
    changed = sorted(path for path in manifest.root.rglob("*.png"))[:13]
    for path in changed:
        path.write_bytes(path.read_bytes() + b"x")
    rows = ImageRows(
        manifest=manifest,
        network=nn.Flatten(),
        function=embed,
        augmentation=Augmentation(image_size=4),
        loader=LoaderConfig(backend="host"),
    )
    with caplog.at_level(logging.WARNING):
        found = rows.read(0, 16)
    assert np.isnan(found[:, 0]).sum() == 13
    lines = [record.message for record in caplog.records]
    assert [line for line in lines if "has changed since the images were listed" in line] == lines[:10]
    assert lines[10:] == ["… and 3 more of 16 images cannot be decoded"]
