"""Whether two images show the same picture, by the correlation of small gray copies; no network is asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.augment import Augmentation

GRAY_SIDE = 20
"""Pixels of a side of a small picture."""
_COMPARED = 16  # pixels of a side of what is correlated
_CROPS = (
    20,
    18,
    16,
)  # sides of the parts that are compared with the whole of the other picture: 1, 0.9 and 0.8 of it
_PAIRS = 1024  # at a time

SMALL = Augmentation(image_size=GRAY_SIDE, squash=True, mean=(0, 0, 0), std=(1, 1, 1))
"""How images become small pictures: whole, whatever their shape."""


def gray(network: nn.Module, images: Tensor) -> Tensor:
    """Small gray pictures, an `ImageFunction`: float32 (B, 20²) of (B, 3, 20, 20), from 0 to 255."""
    return 255 * images.float().mean(dim=1).flatten(1)


def correlations(
    pictures_NP: npt.NDArray[np.uint8], first_M: npt.NDArray[np.int64], second_M: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """The largest correlation of either picture with the other one or a part of it, mirrored or not.

    Parts are squares of 0.9 and 0.8 of the side, in nine places each. Correlation takes no notice of brightness and
    contrast.

    Args:
        pictures_NP: uint8 (N, 20²).
        first_M: int64 (M,), a row of each pair.
        second_M: int64 (M,), the other one.

    Returns:
        float32 (M,), -1 to 1; 0 for pictures of a single gray.
    """
    shape = (-1, 1, GRAY_SIDE, GRAY_SIDE)
    found = []
    for start in range(0, len(first_M), _PAIRS):
        one, other = (
            torch.from_numpy(pictures_NP[rows[start : start + _PAIRS]]).float().view(shape)
            for rows in (first_M, second_M)
        )
        found.append(torch.maximum(_within(one, other), _within(other, one)).numpy())
    return np.concatenate(found) if found else np.empty(0, np.float32)


def _within(pictures_B: Tensor, others_B: Tensor) -> Tensor:
    """Of each other picture as a whole with every part of its picture, the largest, (B,)."""
    whole_B = _resized(others_B)
    wholes_BP = torch.stack([_standardized(whole_B), _standardized(whole_B.flip(3))])
    best_B = torch.full((len(pictures_B),), -1.0)
    for part_B in _parts(pictures_B):
        cosines = (_standardized(_resized(part_B)) * wholes_BP).sum(dim=2)
        best_B = torch.maximum(best_B, cosines.amax(dim=0))
    return best_B


def _parts(pictures_B: Tensor) -> Iterator[Tensor]:
    for side in _CROPS:
        left_over = GRAY_SIDE - side
        places = sorted({0, left_over // 2, left_over})
        for top in places:
            for left in places:
                yield pictures_B[:, :, top : top + side, left : left + side]


def _resized(pictures_B: Tensor) -> Tensor:
    return F.interpolate(pictures_B, size=_COMPARED, mode="bilinear", align_corners=False)


def _standardized(pictures_B: Tensor) -> Tensor:
    """Vectors (B, 16²) of mean 0 and length 1; 0 where a picture has a single gray."""
    rows_BP = pictures_B.flatten(1)
    return F.normalize(rows_BP - rows_BP.mean(dim=1, keepdim=True), dim=1, eps=1e-3)
