"""Numbers without labels against their definitions, written out, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from instdisc.model import label_free
from instdisc.model.bank import random_unit_rows


def test_alignment_and_uniformity_are_the_formulas() -> None:
    first, second = random_unit_rows(0, 40, 8, seed=1).double(), random_unit_rows(0, 40, 8, seed=2).double()
    distances = ((first - second) ** 2).sum(dim=1)
    assert label_free.alignment(first, second) == pytest.approx(float(distances.mean()))
    potential = torch.exp(-2 * torch.nn.functional.pdist(first) ** 2).mean().log()
    assert label_free.uniformity(first) == pytest.approx(float(potential), abs=1e-6)
    assert label_free.uniformity(first[:1].expand(5, -1)) == pytest.approx(0, abs=1e-6)


def test_effective_rank() -> None:
    assert label_free.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert label_free.effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-5)
    rows = random_unit_rows(0, 50, 8, seed=1).double()
    values = torch.linalg.svdvals(rows)
    share = values / values.sum()
    assert label_free.effective_rank(rows) == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
    assert label_free.effective_rank(rows.T) == pytest.approx(label_free.effective_rank(rows))


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_four_points_by_hand() -> None:
    first = at(0, 90, 180, 270)
    second = at(10, 80, 300, 265)  # the third view lies nearest the fourth image, then the first
    found = label_free.describe(first, second)
    assert found.images == 4
    assert found.instance_recall_1 == 3 / 4
    assert label_free.instance_recall(first, second, 2) == 3 / 4
    assert label_free.instance_recall(first, second, 3) == 1
    assert found.instance_recall_10 == 1
    assert found.effective_rank == pytest.approx(2)
    expected = sum(2 - 2 * math.cos(math.radians(angle)) for angle in (10, 10, 120, 5)) / 4
    assert found.alignment == pytest.approx(expected)
    # Four pairs at a right angle, squared distance 2, and two opposite ones, 4.
    assert found.uniformity == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))
    assert label_free.nearest_others(at(0, 10, 25, 180)).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("k", [1, 10])
def test_recall_is_that_of_sorting_all(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_free, "_BLOCK_ENTRIES", 500)  # several blocks
    first = random_unit_rows(0, 90, 6, seed=1)
    second = F.normalize(first + random_unit_rows(0, 90, 6, seed=2), dim=1)
    order = np.argsort(-(second.double().numpy() @ first.double().numpy().T), axis=1)[:, :k]
    expected = np.mean([row in nearest for row, nearest in enumerate(order)])
    assert 0 < expected < 1
    assert label_free.instance_recall(first, second, k) == pytest.approx(expected)


def test_a_collapsed_network_finds_images_by_chance_alone() -> None:
    same = at(30).float().expand(50, -1)
    found = label_free.describe(same, same)
    assert (found.instance_recall_1, found.instance_recall_10) == (
        pytest.approx(1 / 50),
        pytest.approx(10 / 50),
    )
    assert found.effective_rank == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_images", [3, 2048, 2049, 100_000])
def test_the_same_images_are_looked_at(num_images: int) -> None:
    rows = label_free.sampled(num_images)
    assert len(rows) == min(num_images, 2048)
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < num_images
    assert (rows == label_free.sampled(num_images)).all()
