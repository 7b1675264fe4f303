"""Figures of an embedding against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from instdisc.evaluation import statistics
from instdisc.model import label_free
from instdisc.model.bank import random_unit_rows


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
