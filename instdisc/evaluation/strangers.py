"""Images that are far from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.settings.evaluation import StrangersConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_SHOWN = 50  # images that the results name for the page


def run(evaluation: Evaluation, config: StrangersConfig) -> dict[str, Any]:
    """Write `strangers.csv` and `strangers.parquet`: the strangest images, each with its distance and nearest image."""
    scores, rows = evaluation.nearest_others(config.neighbors)
    distances = strangeness(scores)
    order = np.argsort(-distances, kind="stable")
    order = order[np.isfinite(distances[order])][: config.count]
    nearest = evaluation.source.images(rows[order, 0])
    write_table(
        evaluation.output / "strangers",
        {
            "rank": np.arange(1, len(order) + 1),
            "distance": distances[order],
            "nearest_similarity": scores[order, 0],
            **image_columns(evaluation.source.images(order)),
            **{f"nearest_{name}": column for name, column in image_columns(nearest).items()},
        },
    )
    middle = float(np.median(distances[np.isfinite(distances)]))
    return {
        "summary": {
            "distance of the strangest": f"{distances[order[0]]:.3f}",
            "distance of half of the images, below": f"{middle:.3f}",
        },
        "neighbors": scores.shape[1],
        "median_distance": middle,
        "largest_distance": float(distances[order[0]]),
        "shown": [
            {"row": int(row), "others": rows[row].tolist(), "similarities": scores[row].tolist()}
            for row in order[:_SHOWN]
        ],
    }


def strangeness(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """1 minus the mean similarity to the nearest other images, 0 to 2: one near copy does not make it small.

    Args:
        scores: float32 (N, k), similarities, minus infinity for none.

    Returns:
        float64 (N,); minus infinity for an image that has no similarities.
    """
    there = np.isfinite(scores)
    total = np.where(there, scores, 0).sum(axis=1, dtype=np.float64)
    count = there.sum(axis=1)
    return np.where(count > 0, 1 - total / np.maximum(count, 1), -np.inf)
