"""What can be said of an embedding without labels: from two views of every image of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.augment import Augmentation

MOST_IMAGES = 2048
_RAW_SIDE = 32
_BLOCK_ENTRIES = 1 << 20  # similarities held at a time: they stay in the processor's cache


class LabelFree(NamedTuple):
    """Numbers that need no labels."""

    effective_rank: float
    """Of the first views, 1 to min(N, D): see `effective_rank`."""
    alignment: float
    """Of the two views, 0 to 4, smaller is closer: see `alignment`."""
    uniformity: float
    """Of the first views, 0 down to about -4, smaller is more even: see `uniformity`."""
    instance_recall_1: float
    """Share of second views whose nearest first view is that of the same image: see `instance_recall`."""
    instance_recall_10: float
    """Share of second views that have it among the ten nearest."""
    images: int
    """N, images of the sample; recall is easier among fewer."""


def sampled(num_images: int) -> npt.NDArray[np.int64]:
    """The images that are looked at, always the same: all, or 2,048 drawn of more; ascending, int64."""
    if num_images <= MOST_IMAGES:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).choice(num_images, MOST_IMAGES, replace=False))


def usual_views(augmentation: Augmentation) -> Augmentation:
    """How images are varied to be measured: as is usual, whatever a run does, so that its numbers compare with others'.

    Args:
        augmentation: Of the run, for size and normalization.
    """
    names = ("image_size", "training_size", "mean", "std")
    return Augmentation(**{name: getattr(augmentation, name) for name in names})


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline that learns nothing: unit vectors of the pixels, at most 32×32 of them.

    Args:
        images: float (B, 3, H, W), normalized.

    Returns:
        float32 (B, 3·side²).
    """
    side = min(_RAW_SIDE, images.shape[-1])
    return F.normalize(F.adaptive_avg_pool2d(images.float(), side).flatten(1), dim=1)


@torch.no_grad()
def describe(first_ND: Tensor, second_ND: Tensor) -> LabelFree:
    """All of the numbers.

    Args:
        first_ND: Unit vectors (N, D), N at least 2.
        second_ND: Unit vectors (N, D) of another view of the same images.
    """
    return LabelFree(
        effective_rank=effective_rank(first_ND),
        alignment=alignment(first_ND, second_ND),
        uniformity=uniformity(first_ND),
        instance_recall_1=instance_recall(first_ND, second_ND, 1),
        instance_recall_10=instance_recall(first_ND, second_ND, 10),
        images=len(first_ND),
    )


def instance_recall(first_ND: Tensor, second_ND: Tensor, k: int) -> float:
    """Share of second views that have the first view of their own image among the k most similar first views.

    It is what the objectives train. Where other first views are exactly as similar
    as the own one, the expectation over their order counts, so that equal embeddings give k / N.

    Args:
        first_ND: Unit vectors (N, D).
        second_ND: Likewise; row i is of the same image.
        k: At least 1.
    """
    hits = torch.zeros((), dtype=torch.float64)
    for start, cosines_BN in _similarities(second_ND.float(), first_ND.float()):
        own_B = cosines_BN.diagonal(start)
        nearer_B = (cosines_BN > own_B[:, None]).sum(dim=1)
        tied_B = (cosines_BN == own_B[:, None]).sum(dim=1)  # itself among them
        hits += ((k - nearer_B) / tied_B).double().clamp(0, 1).sum().cpu()
    return float(hits) / len(first_ND)


def nearest_others(embeddings_ND: Tensor) -> Tensor:
    """The most similar other row of every row, int64 (N,); N at least 2."""
    rows_ND = embeddings_ND.float()
    found = []
    for start, cosines_BN in _similarities(rows_ND, rows_ND):
        cosines_BN.diagonal(start).fill_(-math.inf)
        found.append(cosines_BN.argmax(dim=1))
    return torch.cat(found)


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
    for cosines, _ in pairs(embeddings_ND):
        total += float(torch.exp(2 * scale * (cosines - 1)).sum(dtype=torch.float64))
        count += len(cosines)
    return math.log(total / count)


def effective_rank(embeddings_ND: Tensor) -> float:
    """Exponential of the entropy of the normalized singular values, 1 to min(N, D).

    Roy and Vetterli 2007; RankMe of Garrido et al. 2023 (arXiv 2210.02885, Eq. 1) but for its small constants.

    Args:
        embeddings_ND: (N, D), not all zero.
    """
    rows = embeddings_ND.double()
    # The eigenvalues of the smaller Gram matrix are the squares; in float64 they are exact enough.
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def pairs(embeddings_ND: Tensor, labels_N: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of different rows, in blocks.

    Yields:
        The similarities of P pairs, float32 (P,), and whether their labels agree, bool (P,).
    """
    rows_ND = embeddings_ND.float()
    labels_N = torch.zeros(len(rows_ND), device=rows_ND.device) if labels_N is None else labels_N
    block = max(1, _BLOCK_ENTRIES // max(1, len(rows_ND)))
    for first in range(0, len(rows_ND), block):
        cosines = rows_ND[first : first + block] @ rows_ND[first:].T
        upper = torch.ones_like(cosines, dtype=torch.bool).triu_(1)
        agree = labels_N[first : first + block, None] == labels_N[first:]
        yield cosines[upper], agree[upper]


def _similarities(queries_ND: Tensor, rows_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number of the first query of a block, and the similarities (B, N) of the block to all rows."""
    block = max(1, _BLOCK_ENTRIES // max(1, len(rows_ND)))
    for start in range(0, len(queries_ND), block):
        yield start, queries_ND[start : start + block] @ rows_ND.T
