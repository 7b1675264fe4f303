"""Whitening: embeddings compared in a space whose directions all count alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_COMPONENTS = 128
POWER = 1.0
"""Of the inverse standard deviations; fixed beforehand. 0 only centers, 1 whitens fully."""
_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class Whitening:
    """A linear map fitted to rows without labels; see `fit`."""

    mean_D: Tensor
    """float32 (D,)."""
    matrix_DK: Tensor
    """float32 (D, K)."""

    def __call__(self, rows_ND: Tensor) -> Tensor:
        """Unit vectors float32 (N, K) of float32 (N, D)."""
        return F.normalize((rows_ND - self.mean_D) @ self.matrix_DK, dim=1)


def fit(
    rows_ND: Tensor, total: Callable[[Tensor], Tensor] = lambda each: each, power: float = POWER
) -> Whitening:
    """Center, keep up to 128 principal components, and divide each by a power of its standard deviation.

    The variances are shrunk towards their mean (Ledoit and Wolf 2004), the more the fewer rows there are for the
    dimensions; components in which the rows do not vary are left out.

    Args:
        rows_ND: float32 (N, D), this rank's; N may be 0 on some ranks, but not on all.
        total: The elementwise sum over the ranks; `Exchange.sum`.
        power: 0 to 1.

    Collectives: `total` three times; every rank must call.
    """
    dim = rows_ND.shape[1]
    count_and_sum = torch.zeros(dim + 1, dtype=torch.float64, device=rows_ND.device)
    count_and_sum[0], count_and_sum[1:] = len(rows_ND), rows_ND.double().sum(dim=0)
    count_and_sum = total(count_and_sum)
    count, mean_D = float(count_and_sum[0]), count_and_sum[1:] / count_and_sum[0]
    products_DD = torch.zeros(dim, dim, dtype=torch.float64, device=rows_ND.device)
    for rows_BD in torch.split(rows_ND, _BLOCK):
        centered_BD = rows_BD.double() - mean_D
        products_DD += centered_BD.T @ centered_BD
    variances_K, axes_DK = _leading(total(products_DD) / count, count)
    fourth = torch.zeros((), dtype=torch.float64, device=rows_ND.device)
    for rows_BD in torch.split(rows_ND, _BLOCK):
        fourth += ((rows_BD.double() - mean_D) @ axes_DK).square().sum(dim=1).square().sum()
    shrinkage = _ledoit_wolf(variances_K, float(total(fourth)), count)
    shrunk_K = (1 - shrinkage) * variances_K + shrinkage * variances_K.mean()
    matrix_DK = axes_DK * shrunk_K.pow(-power / 2)
    return Whitening(mean_D.float(), matrix_DK.float())


def _leading(covariance_DD: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, float64 (K,), that differ from 0, and their vectors (D, K); at least one.

    Args:
        covariance_DD: float64 (D, D).
        count: Rows that it is of.
    """
    values, vectors = _eigen(covariance_DD, count)
    values, vectors = values[-MOST_COMPONENTS:], vectors[:, -MOST_COMPONENTS:]
    varies = values > max(float(values[-1]) * len(covariance_DD) * 1e-12, 1e-30)
    if not varies.any():  # all rows are the same
        return torch.ones_like(values[-1:]), vectors[:, -1:]
    return values[varies], vectors[:, varies]


def _eigen(covariance_DD: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and their vectors: all, or at least the 128 largest where that takes less time."""
    dim = len(covariance_DD)
    if dim <= MOST_COMPONENTS:
        return _eigh(covariance_DD)
    if count <= MOST_COMPONENTS:
        # The rows span so few directions that what the covariance makes of as many random ones spans them all.
        generator = torch.Generator().manual_seed(0)
        random_DK = torch.randn(dim, MOST_COMPONENTS, dtype=torch.float64, generator=generator)
        basis_DK = torch.linalg.qr(covariance_DD @ random_DK.to(covariance_DD.device))[0]
        values, vectors = _eigh(basis_DK.T @ covariance_DD @ basis_DK)
        return values, basis_DK @ vectors
    if covariance_DD.device.type != "cpu":
        return _eigh(covariance_DD)
    import scipy.linalg  # not at the top: a machine that measures on GPUs alone need not have it

    leading = (dim - MOST_COMPONENTS, dim - 1)
    values, vectors = scipy.linalg.eigh(covariance_DD.numpy(), subset_by_index=leading)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def _ledoit_wolf(variances_K: Tensor, fourth: float, count: float) -> float:
    """The shrinkage, 0 to 1, of a covariance given by its eigenvalues.

    Args:
        variances_K: float64 (K,).
        fourth: Sum of the fourth powers of the lengths of the centered rows.
        count: Rows.
    """
    squares = float(variances_K.square().sum())
    spread = squares - float(variances_K.sum()) ** 2 / len(variances_K)
    noise = (fourth / count - squares) / count
    return 1.0 if spread <= 0 else min(max(noise, 0) / spread, 1.0)
