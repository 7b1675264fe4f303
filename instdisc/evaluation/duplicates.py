"""Images that are the same but for format, size, crop or color: groups of rows that are closer than a threshold."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from instdisc.common.errors import ConfigError
from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.evaluation.statistics import two_views
from instdisc.model.label_free import sampled
from instdisc.settings.evaluation import DuplicatesConfig
from pipelines.augment import Augmentation
from pipelines.errors import DataError

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_COST = 10
"""Copies that may be missed to spare one wrong pair."""
_SHOWN = 50  # groups that the results name for the page


def run(evaluation: Evaluation, config: DuplicatesConfig) -> dict[str, Any]:
    """Write `duplicates.csv` and `duplicates.parquet`: the groups, the largest first, each with the image to keep.

    Raises:
        ConfigError: No threshold is given, and the images that would suggest one cannot be read.
    """
    scores, rows = evaluation.nearest_others(config.neighbors)
    threshold, copies, others = config.threshold, None, None
    if threshold is None:
        copies = similarities_of_copies(evaluation, config.seed)
        others = scores[sampled(len(scores)), 0]
        threshold = suggest_threshold(copies, others)
    group = group_rows(scores, rows, threshold)
    members = np.flatnonzero(group >= 0)
    images = evaluation.source.images(members)
    order, keep = kept_first(
        group[members], images.heights.astype(np.int64) * images.widths, np.asarray(images.sizes)
    )
    members, images = members[order], images.select(order)
    write_table(
        evaluation.output / "duplicates",
        {
            "group": group[members] + 1,
            "keep": keep,
            "similarity": scores[members, 0],
            "width": images.widths,
            "height": images.heights,
            "bytes": images.sizes,
            **image_columns(images),
        },
    )
    starts = np.flatnonzero(keep)
    sizes = np.diff([*starts, len(members)])
    shown = [members[start : start + size] for start, size in zip(starts, sizes, strict=True)][:_SHOWN]
    return {
        "summary": {
            "threshold": f"{threshold:.3f}",
            "groups": len(starts),
            "images in groups": len(members),
            "images that could go": len(members) - len(starts),
        },
        "threshold": float(threshold),
        "is_suggested": config.threshold is None,
        "copies_above_threshold": None if copies is None else float((copies >= threshold).mean()),
        "others_above_threshold": None if others is None else float((others >= threshold).mean()),
        "groups": len(starts),
        "images": len(members),
        "largest_group": int(sizes.max(initial=0)),
        "shown": [
            {"row": int(each[0]), "others": each[1:].tolist(), "similarities": scores[each[1:], 0].tolist()}
            for each in shown
        ],
    }


def similarities_of_copies(evaluation: Evaluation, seed: int) -> Floats:
    """Cosine of two views of an image that differ as copies do, for up to 2,048 images, float32.

    The views are crops of at least 80% of the image, mirrored half of the time, in colors that differ slightly.
    """
    names = ("image_size", "training_size", "mean", "std")
    source = evaluation.source
    slight = Augmentation(
        **{name: getattr(source.augmentation, name) for name in names},
        crop_scale=(0.8, 1.0),
        brightness=0.2,
        contrast=0.1,
        saturation=0.1,
        hue=0.02,
        grayscale_probability=0.0,
    )
    try:
        first, second = two_views(evaluation, sampled(source.snapshot.num_rows), slight, seed=seed)
    except (DataError, OSError) as error:
        raise ConfigError(
            f"the images that would suggest a threshold cannot be read ({error}): give one with "
            "--duplicates.threshold, such as 0.9"
        ) from error
    if not len(first):
        raise ConfigError(
            "none of the images that would suggest a threshold can be decoded: give one with "
            "--duplicates.threshold, such as 0.9"
        )
    return np.asarray(torch.sum(first * second, dim=1).numpy())


def suggest_threshold(copies: Floats, others: Floats) -> float:
    """The similarity above which two images are taken for one.

    It minimises the share of copies below it plus ten times the share of images above it that have another image so
    close, among the similarities up to the median of the copies: whatever else is in the collection, half of the copies
    are found. Duplicates that are in the collection are among `others` and hardly move it.

    Args:
        copies: (M,), similarities of two views of one image.
        others: (M,), similarities of images to their nearest other ones.
    """
    copies, others = np.sort(copies), np.sort(others)
    # In float32, as the similarities that are compared with it: what is just above one of them stays so.
    candidates = np.unique(np.concatenate([copies, np.nextafter(others, np.float32(2))]))
    candidates = candidates[candidates <= np.median(copies)]
    missed = np.searchsorted(copies, candidates) / len(copies)
    wrong = 1 - np.searchsorted(others, candidates) / len(others)
    return float(candidates[np.argmin(missed + _COST * wrong)])


def group_rows(scores: Floats, rows: Ids, threshold: float) -> Ids:
    """Rows that are connected by pairs at least as similar as the threshold.

    Args:
        scores: float32 (N, k), similarities of the nearest other rows, minus infinity for none.
        rows: int64 (N, k), those rows.
        threshold: Of the similarity.

    Returns:
        int64 (N,), the number of each row's group, -1 for a row without one. Larger groups come first, then those with
        earlier rows.
    """
    count = len(scores)
    near, place = np.nonzero(scores >= threshold)
    graph = coo_array((np.ones(len(near), bool), (near, rows[near, place])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component, minlength=1)
    _, first = np.unique(component, return_index=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(len(sizes), np.int64)
    number[order] = np.arange(len(sizes))
    number[sizes < 2] = -1
    return np.asarray(number[component])


def kept_first(
    group: Ids, pixels: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """The order of images in which every group begins with the one to keep.

    That is the one with the most pixels, then with the most bytes, then the first.

    Args:
        group: int64 (M,), of each image.
        pixels: (M,).
        size: (M,), bytes.

    Returns:
        Order int64 (M,), and for each image in that order whether it is kept, bool (M,).
    """
    order = np.lexsort((-size, -pixels, group))
    keep = np.ones(len(order), bool)
    keep[1:] = np.diff(group[order]) != 0
    return order, keep
