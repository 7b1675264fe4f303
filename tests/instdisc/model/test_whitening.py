"""Whitening against scikit-learn, and by several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from cluster.exchange import Exchange
from instdisc.model import whitening
from tests.processes import run_ranks


def stretched(count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows whose directions vary very differently, around a common center."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * torch.logspace(0, -2, dim) + 0.5


@pytest.mark.parametrize(("count", "dim"), [(500, 16), (40, 20), (12, 8)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_metric_is_that_of_the_shrunk_covariance(count: int, dim: int, power: float) -> None:
    rows = stretched(count, dim)
    fitted = whitening.fit(rows, power=power)
    values, vectors = np.linalg.eigh(LedoitWolf().fit(rows.double().numpy()).covariance_)
    expected = vectors * values**-power @ vectors.T
    matrix = fitted.matrix_DK.double().numpy()
    np.testing.assert_allclose(matrix @ matrix.T, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(fitted.mean_D, rows.mean(dim=0), atol=1e-6)
    torch.testing.assert_close(fitted(rows).norm(dim=1), torch.ones(count))


def test_the_power_0_only_centers() -> None:
    rows = stretched(50, 8)
    centered = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    found = whitening.fit(rows, power=0)(rows)
    torch.testing.assert_close(found @ found.T, centered @ centered.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "components"),
    [(stretched(5, 30), 4), (stretched(1, 8), 1), (torch.ones(6, 8), 1), (stretched(500, 200), 128)],
)
def test_fewer_rows_than_dimensions(rows: Tensor, components: int) -> None:
    """Only directions in which the rows vary are left, at most 128 of them; nothing is infinite."""
    fitted = whitening.fit(rows)
    assert fitted.matrix_DK.shape == (rows.shape[1], components)
    assert fitted(rows).isfinite().all()
    assert fitted(torch.randn(3, rows.shape[1])).isfinite().all()


def of_rank(rank: int, world_size: int) -> Tensor:
    rows = stretched(100, 12)
    bounds = {1: [0, 100], 2: [0, 37, 100], 3: [0, 60, 60, 100]}[world_size]
    mine = rows[bounds[rank] : bounds[rank + 1]]
    fitted = whitening.fit(mine, Exchange(rank, world_size).sum)
    return fitted.matrix_DK @ fitted.matrix_DK.T


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_fit_what_one_fits(world_size: int) -> None:
    """With uneven shares, one of them empty."""
    (expected,) = run_ranks(1, of_rank)
    for found in run_ranks(world_size, of_rank):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [2, 60, 128, 129, 400])
def test_the_leading_directions_are_those_of_the_whole_decomposition(count: int) -> None:
    rows = stretched(count, 200).double()
    centered = rows - rows.mean(dim=0)
    covariance = centered.T @ centered / count
    values, axes = whitening._leading(covariance, count)
    exact, all_axes = torch.linalg.eigh(covariance)
    expected = min(128, count - 1)
    assert len(values) == expected
    torch.testing.assert_close(values, exact[-expected:], rtol=1e-9, atol=1e-12)
    spanned = all_axes[:, -expected:]
    torch.testing.assert_close(axes @ axes.T, spanned @ spanned.T, rtol=0, atol=1e-7)
