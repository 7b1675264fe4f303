"""Figures of an embedding against their definitions, written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from instdisc.common.errors import ConfigError
from instdisc.evaluation import statistics
from instdisc.evaluation.attributes import read_attributes
from instdisc.model import label_free
from instdisc.model.bank import random_unit_rows
from pipelines.build import build_manifest
from tests.instdisc.program import write_pictures


def test_pairs_of_classes_are_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_free, "_BLOCK_ENTRIES", 100)  # several blocks
    rows, labels = random_unit_rows(0, 30, 8, seed=1), torch.arange(30) % 4
    labels[3] = -1
    cosines = rows.double().numpy() @ rows.double().numpy().T
    expected: dict[bool, list[float]] = {True: [], False: []}
    for one in range(30):
        for other in range(one):
            if 3 not in (one, other):
                expected[bool(labels[one] == labels[other])].append(cosines[one, other])
    for pairs, same in zip(statistics.class_pairs(rows, labels, bins=20), (True, False), strict=True):
        assert pairs.counts.tolist() == np.histogram(expected[same], 20, (-1, 1))[0].tolist()
        assert pairs.mean == pytest.approx(np.mean(expected[same]), abs=1e-6)


def test_all_pairs_and_matched_pairs() -> None:
    rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    pairs = statistics.all_pairs(rows, bins=4)
    assert pairs.counts.tolist() == [1, 0, 2, 0]
    assert pairs.mean == pytest.approx(-1 / 3)
    assert statistics.matched_pairs(rows, rows, bins=4).counts.tolist() == [0, 0, 0, 3]
    assert math.isnan(statistics.all_pairs(rows[:1]).mean)


def test_attributes_are_those_of_the_keys(tmp_path: Path) -> None:
    images = build_manifest(write_pictures(tmp_path / "images", 4, classes=2), show_progress=False)
    keys, file = list(images.keys), tmp_path / "attributes.csv"
    lines = [
        f"{keys[2]},light,night",
        f"{keys[0]},light,day",
        "gone.png,light,dusk",
        "gone.png,size,2",
        f"{keys[1]},size,1",
    ]
    file.write_text("key,attribute,value\n" + "\n".join(lines) + "\n")
    found = read_attributes(file, images)
    assert {name: labels.tolist() for name, labels in found.labels.items()} == {
        "light": [0, -1, 2, -1],
        "size": [-1, 0, -1, -1],
    }
    assert found.unknown_keys == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,attribute,value\n", "begins with 'image,attribute,value', expected key,attribute,value"),
        ("key,attribute,value\n0.png,light\n", "line 2: '0.png,light', expected"),
        (
            "key,attribute,value\n0.png,light,day\n0.png,light,night\n",
            "line 3: 0.png has light night, and before it day",
        ),
        (
            "key,attribute,value\n0.png,light,day\n",
            r"no key of an image: got 0\.png, those of the images are such as 000\.png",
        ),
        ("", "begins with ''"),
        (None, "cannot read --statistics.attributes .*No such file"),
    ],
)
def test_attributes_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    images = build_manifest(write_pictures(tmp_path / "images", 2), show_progress=False)
    if text is not None:
        (tmp_path / "attributes.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_attributes(tmp_path / "attributes.csv", images)
