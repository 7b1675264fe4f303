"""Views of images that are decoded as stored: where they lie, and how to turn the squares cut from there upright."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment import ViewParameters
from pipelines.exif import TURNS, UPRIGHT


def views_as_stored(
    views: ViewParameters, orientations: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]
) -> ViewParameters:
    """Move the boxes of views to where they lie in the images as stored.

    Args:
        views: Of the images as shown, (B, V).
        orientations: int64 (B,), of the images.
        sizes: int32 (B, 2), heights and widths of the images as shown.

    Returns:
        The parameters (B, V). Images that are not upright are not flipped: `turn_squares` does it afterwards.
    """
    indices = np.flatnonzero(orientations != UPRIGHT)
    if not len(indices):
        return views
    boxes = np.stack([views.top, views.left, views.height, views.width])
    flip = views.flip.copy()
    flip[indices] = False
    for index in indices:
        turn = TURNS[int(orientations[index])]
        top, left, height, width = boxes[:, index].copy()  # assigned piecewise below
        if turn.flip_rows:
            top = sizes[index, 0] - top - height
        if turn.flip_columns:
            left = sizes[index, 1] - left - width
        boxes[:, index] = (left, top, width, height) if turn.swap else (top, left, height, width)
    return views._replace(top=boxes[0], left=boxes[1], height=boxes[2], width=boxes[3], flip=flip)


def turn_squares(
    squares: torch.Tensor, orientations: npt.NDArray[np.int64], flip: npt.NDArray[np.bool_]
) -> None:
    """Turn views of images as stored upright, then flip them left to right where wanted; in place.

    Args:
        squares: (V, B, S, S, C). Those of upright images stay as they are.
        orientations: int64 (B,), of the images.
        flip: bool (B, V).
    """
    for index in np.flatnonzero(orientations != UPRIGHT).tolist():
        turn = TURNS[int(orientations[index])]
        for square, mirrored in zip(squares[:, index], flip[index].tolist(), strict=True):
            axes = [
                axis for axis, wanted in enumerate((turn.flip_rows, turn.flip_columns != mirrored)) if wanted
            ]
            stored = square.clone()
            square.copy_((stored.transpose(0, 1) if turn.swap else stored).flip(axes))
