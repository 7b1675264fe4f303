"""What an embedding looks like: similarities of pairs, alignment, uniformity and effective rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 23  # similarities held at a time: 32 MB of float32


class Pairs(NamedTuple):
    """Cosine similarities of many pairs, summed up.

    Attributes:
        counts: int64 (bins,), pairs in each of `bins` equal intervals of [-1, 1].
        mean: Mean similarity; nan without any pair.
    """

    counts: Tensor
    mean: float


def matched_pairs(first_ND: Tensor, second_ND: Tensor, *, bins: int = 100) -> Pairs:
    """Similarities of row i of one table to row i of another, say of two views of image i.

    Args:
        first_ND: Unit vectors (N, D).
        second_ND: Likewise.
        bins: Intervals of the histogram.
    """
    cosines_N = (first_ND.float() * second_ND.float()).sum(dim=1)
    return _summarise([cosines_N], bins)


def class_pairs(embeddings_ND: Tensor, labels_N: Tensor, *, bins: int = 100) -> tuple[Pairs, Pairs]:
    """Similarities of all pairs of rows, of the same class and of different ones.

    Args:
        embeddings_ND: Unit vectors (N, D).
        labels_N: int64 (N,); rows with a negative label are of no class and left out.
        bins: Intervals of the histograms.

    Returns:
        Pairs of the same class, pairs of two classes.
    """
    labelled_N = labels_N >= 0
    embeddings_ND, labels_N = embeddings_ND[labelled_N], labels_N[labelled_N]
    same, different = _Sum(bins), _Sum(bins)
    for rows, columns, cosines in _upper_triangle(embeddings_ND):
        agree = labels_N[rows] == labels_N[columns]
        same.add(cosines[agree])
        different.add(cosines[~agree])
    return same.pairs(), different.pairs()


def all_pairs(embeddings_ND: Tensor, *, bins: int = 100) -> Pairs:
    """Similarities of all pairs of different rows.

    Args:
        embeddings_ND: Unit vectors (N, D).
        bins: Intervals of the histogram.
    """
    return _summarise((cosines for _, _, cosines in _upper_triangle(embeddings_ND)), bins)


def alignment(first_ND: Tensor, second_ND: Tensor) -> float:
    """Mean squared distance of positive pairs, 0 (best) to 4 (Wang and Isola 2020, with α = 2).

    Args:
        first_ND: Unit vectors (N, D).
        second_ND: Unit vectors (N, D); row i is the positive of row i of the first.
    """
    return float((first_ND.double() - second_ND.double()).square().sum(dim=1).mean())


def uniformity(embeddings_ND: Tensor, *, scale: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of different rows (Wang and Isola 2020).

    Args:
        embeddings_ND: Unit vectors (N, D), N at least 2.
        scale: t of the potential `exp(-t·‖x - y‖²)`.

    Returns:
        0 if all rows are the same, down to about `-2·scale` if they are spread over the sphere.
    """
    total, count = 0.0, 0
    for _, _, cosines in _upper_triangle(embeddings_ND):
        total += float(torch.exp(2 * scale * (cosines.double() - 1)).sum())
        count += len(cosines)
    return math.log(total / count)


def effective_rank(embeddings_ND: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007), 1 to min(N, D).

    Args:
        embeddings_ND: (N, D), not all zero.
    """
    # The eigenvalues of the Gram matrix are the squares; in float64 they are exact enough, and D×D is small.
    gram_DD = embeddings_ND.double().T @ embeddings_ND.double()
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    share_D = singular_D / singular_D.sum()
    return float(torch.exp(-torch.special.xlogy(share_D, share_D).sum()))


class _Sum:
    def __init__(self, bins: int) -> None:
        self._counts, self._total = torch.zeros(bins, dtype=torch.int64), 0.0

    def add(self, cosines: Tensor) -> None:
        bins = len(self._counts)
        places = ((cosines + 1) * (bins / 2)).long().clamp_(0, bins - 1)  # rounding may lead out of [-1, 1]
        self._counts += torch.bincount(places, minlength=bins).cpu()
        self._total += float(cosines.sum(dtype=torch.float64))

    def pairs(self) -> Pairs:
        count = int(self._counts.sum())
        return Pairs(self._counts, self._total / count if count else math.nan)


def _summarise(blocks: Iterator[Tensor] | list[Tensor], bins: int) -> Pairs:
    total = _Sum(bins)
    for cosines in blocks:
        total.add(cosines)
    return total.pairs()


def _upper_triangle(embeddings_ND: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers i < j and similarities of all pairs, in blocks; three tensors (P,) each."""
    rows_ND = embeddings_ND.float()
    block = max(1, _BLOCK_ENTRIES // max(1, len(rows_ND)))
    for first in range(0, len(rows_ND), block):
        cosines = rows_ND[first : first + block] @ rows_ND[first:].T
        upper = torch.ones_like(cosines, dtype=torch.bool).triu_(1)
        rows, columns = upper.nonzero(as_tuple=True)
        yield rows + first, columns + first, cosines[upper]
