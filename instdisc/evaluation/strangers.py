"""Images that the network sees unlike all others, in one of its stages or in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.model.backbone import Embedder
from instdisc.model.features import stage_means
from instdisc.model.label_free import sampled
from instdisc.settings.evaluation import StrangersConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_COMPONENTS = 16
"""Principal components of a stage that count. With more than about a hundred, strangers of one kind that are 1% of the
images would hide: their distance squared is at most 100."""
_SHOWN = 50  # images that the results name for the page


def run(evaluation: Evaluation, config: StrangersConfig) -> dict[str, Any]:
    """Write `strangers.csv` and `strangers.parquet`: the strangest images, each with its distance and nearest image.

    All images are read; raises DataError where they cannot be.
    """
    source = evaluation.source
    means = evaluation.compute(source.train, joined_means, rows=sampled(len(source.train)))
    distance = fit(means, stage_widths(source.network, source.augmentation.image_size))
    distances = evaluation.compute(source.train, distance)[:, 0]
    order = np.argsort(-distances, kind="stable")  # NaN at the end
    order = order[np.isfinite(distances[order])][: config.count]
    scores, rows = evaluation.nearest_others(config.neighbors)
    nearest = source.images(rows[order, 0])
    write_table(
        evaluation.output / "strangers",
        {
            "rank": np.arange(1, len(order) + 1),
            "distance": distances[order],
            "nearest_similarity": scores[order, 0],
            **image_columns(source.images(order)),
            **{f"nearest_{name}": column for name, column in image_columns(nearest).items()},
        },
    )
    middle = float(np.nanmedian(distances))
    return {
        "summary": {
            "distance of the strangest": f"{distances[order[0]]:.3f}",
            "distance of half of the images, below": f"{middle:.3f}",
        },
        "median_distance": middle,
        "largest_distance": float(distances[order[0]]),
        "shown": [
            {"row": int(row), "others": rows[row].tolist(), "similarities": scores[row].tolist()}
            for row in order[:_SHOWN]
        ],
    }


def joined_means(network: Embedder, images: Tensor) -> Tensor:
    """The means of all stages one after another, an `ImageFunction`."""
    return torch.cat(stage_means(network, images), dim=1)


def stage_widths(network: Embedder, image_size: int) -> list[int]:
    """How many means each stage has."""
    return [
        means.shape[1] for means in stage_means(network.eval(), torch.zeros(1, 3, image_size, image_size))
    ]


@dataclass(frozen=True, eq=False)
class Distance:
    """How far images are from the usual ones, an `ImageFunction`; see `fit`."""

    mean_F: Tensor
    """float32 (F,)."""
    matrix_FK: Tensor
    """float32 (F, K)."""

    def __call__(self, network: Embedder, images: Tensor) -> Tensor:
        """Distances float32 (B, 1)."""
        return self.of(joined_means(network, images))[:, None]

    def of(self, means_BF: Tensor) -> Tensor:
        """Distances float32 (B,); the root of the mean square of those that they are fitted to is 1."""
        centered_BF = means_BF - self.mean_F.to(means_BF.device)
        return (centered_BF @ self.matrix_FK.to(means_BF.device)).square().mean(dim=1).sqrt()


def fit(means_NF: npt.NDArray[np.float32], widths: Sequence[int]) -> Distance:
    """The Mahalanobis distance in the leading principal components of each stage, stages taken together.

    As in Lee et al. 2018 (arXiv 1807.03888), without classes: the squares of up to 16 components of every stage, each
    divided by its variance, count alike.

    Args:
        means_NF: float32 (N, F), of all stages one after another; rows of NaN are skipped.
        widths: Of each stage, F together.
    """
    rows_NF = means_NF[np.isfinite(means_NF[:, 0])].astype(np.float64)
    mean_F = rows_NF.mean(axis=0)
    columns, start = [], 0
    for width in widths:
        own_NC = rows_NF[:, start : start + width] - mean_F[start : start + width]
        _, deviations, axes = np.linalg.svd(own_NC / np.sqrt(len(own_NC)), full_matrices=False)
        counted = deviations[:_COMPONENTS] > max(deviations[0] * 1e-4, 1e-12)
        part = np.zeros((means_NF.shape[1], int(counted.sum())))
        part[start : start + width] = (
            axes[:_COMPONENTS][counted] / deviations[:_COMPONENTS][counted, None]
        ).T
        columns.append(part)
        start += width
    matrix = np.concatenate(columns, axis=1)
    if not matrix.shape[1]:  # all images are the same
        matrix = np.zeros((len(mean_F), 1))
    return Distance(torch.from_numpy(mean_F).float(), torch.from_numpy(matrix).float())
