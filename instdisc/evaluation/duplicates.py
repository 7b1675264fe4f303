"""Images that are the same but for format, size, crop or color: groups of near rows that show one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from instdisc.common.errors import ConfigError
from instdisc.evaluation.correlation import SMALL, correlations, gray
from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.settings.evaluation import DuplicatesConfig
from pipelines.errors import DataError

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_SHOWN = 50  # groups that the results name for the page


def run(evaluation: Evaluation, config: DuplicatesConfig) -> dict[str, Any]:
    """Write `duplicates.csv` and `duplicates.parquet`: the groups, the largest first, each with the image to keep.

    Raises:
        ConfigError: No threshold is given, and the images cannot be read.
    """
    scores, rows = evaluation.nearest_others(config.neighbors)
    first, second = pairs_of(scores, rows, -1 if config.threshold is None else config.threshold)
    if config.threshold is None:
        same = _correlations(evaluation, first, second) >= config.correlation
        first, second = first[same], second[same]
    group = group_rows(first, second, len(scores))
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
    rule = (
        f"pictures with a correlation of {config.correlation:g} or more"
        if config.threshold is None
        else f"embeddings with a similarity of {config.threshold:g} or more"
    )
    return {
        "summary": {
            "groups": len(starts),
            "images in groups": len(members),
            "images that could go": len(members) - len(starts),
        },
        "rule": rule,
        "groups": len(starts),
        "images": len(members),
        "largest_group": int(sizes.max(initial=0)),
        "shown": [
            {"row": int(each[0]), "others": each[1:].tolist(), "similarities": scores[each[1:], 0].tolist()}
            for each in shown
        ],
    }


def _correlations(evaluation: Evaluation, first: Ids, second: Ids) -> Floats:
    """Of pairs of images, -1 for one that cannot be decoded; see `correlations`."""
    hint = "with --duplicates.threshold, such as 0.95, embeddings are compared alone"
    try:
        pictures = evaluation.compute(evaluation.source.train, gray, augmentation=SMALL)
    except (DataError, OSError) as error:
        raise ConfigError(
            f"the images, whose pictures are compared, cannot be read ({error}): {hint}"
        ) from error
    there = np.isfinite(pictures[:, 0])
    if not there.any():
        raise ConfigError(f"none of the images, whose pictures are compared, can be decoded: {hint}")
    pictures[~there] = 0
    found = correlations(pictures.round().astype(np.uint8), first, second)
    found[~(there[first] & there[second])] = -1
    return found


def pairs_of(scores: Floats, rows: Ids, threshold: float) -> tuple[Ids, Ids]:
    """Every pair of neighbors that are at least as similar as the threshold, once.

    Args:
        scores: float32 (N, k), similarities of the nearest other rows, minus infinity for none.
        rows: int64 (N, k), those rows.
        threshold: Of the similarity.

    Returns:
        The smaller and the larger row of each pair, int64 (M,).
    """
    near, place = np.nonzero(scores >= threshold)
    other = rows[near, place]
    pairs = np.unique(np.stack([np.minimum(near, other), np.maximum(near, other)]), axis=1)
    return pairs[0], pairs[1]


def group_rows(first: Ids, second: Ids, count: int) -> Ids:
    """Rows that are connected by pairs.

    Args:
        first: int64 (M,), a row of each pair.
        second: int64 (M,), the other one.
        count: N, of the rows.

    Returns:
        int64 (N,), the number of each row's group, -1 for a row without one. Larger groups come first, then those with
        earlier rows.
    """
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component, minlength=1)
    _, earliest = np.unique(component, return_index=True)
    order = np.lexsort((earliest, -sizes))
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
