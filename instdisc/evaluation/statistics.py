"""What an embedding looks like: similarities of pairs, alignment, uniformity and effective rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instdisc.common.errors import ConfigError
from instdisc.evaluation.attributes import read_attributes
from instdisc.evaluation.images import ImageFunction, compute_device, embed
from instdisc.model import label_free
from instdisc.settings.evaluation import StatisticsConfig
from pipelines.augment import Augmentation
from pipelines.loader import open_loader
from pipelines.order import Request

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_BATCH = 128


def run(evaluation: Evaluation, config: StatisticsConfig) -> dict[str, Any]:
    """Describe recomputed embeddings of the training images; labels are optional.

    Positives are two random views of an image, as training varies them; where images have labels, also two images of
    one class.

    Raises:
        ConfigError: Fewer than two images can be decoded, or the attributes cannot be read.
    """
    train = evaluation.source.train
    given = None if config.attributes is None else read_attributes(config.attributes, train)
    rows = np.linspace(0, len(train) - 1, min(config.max_images, len(train))).astype(np.int64)
    embeddings = torch.from_numpy(evaluation.compute(train, rows=rows))
    decoded = embeddings[:, 0].isfinite()
    labels = torch.from_numpy(np.asarray(train.labels)[rows].astype(np.int64))[decoded]
    embeddings = embeddings[decoded]
    if len(embeddings) < 2:
        raise ConfigError(
            f"only {len(embeddings)} of {len(rows)} training images can be decoded: restore them"
        )
    first, second = two_views(
        evaluation, rows[decoded.numpy()], augmentation=evaluation.source.augmentation, seed=config.seed
    )
    pairs = {"two views of an image": matched_pairs(first, second, bins=config.bins)}
    if (labels >= 0).any():
        same, different = class_pairs(embeddings, labels, bins=config.bins)
        pairs |= {"images of one class": same, "images of two classes": different}
    else:
        pairs["different images"] = all_pairs(embeddings, bins=config.bins)
    attributes: dict[str, dict[str, Pairs]] = {}
    for name, numbers in (given.labels if given else {}).items():
        same, different = class_pairs(embeddings, torch.from_numpy(numbers[rows])[decoded], bins=config.bins)
        attributes[name] = {
            f"images of one value ({name})": same,
            f"images of two values ({name})": different,
        }
    values = {
        "alignment": label_free.alignment(first, second),
        "uniformity": label_free.uniformity(embeddings),
        "effective_rank": label_free.effective_rank(embeddings),
    }
    return {
        # As text, since numbers below 1 are printed as shares.
        "summary": {
            **{name.replace("_", " "): f"{value:.3f}" for name, value in values.items()},
            **{
                f"mean cosine, {name}": f"{each.mean:.3f}"
                for described in (pairs, *attributes.values())
                for name, each in described.items()
            },
            **(
                {"unknown keys of attributes": str(given.unknown_keys)}
                if given and given.unknown_keys
                else {}
            ),
        },
        "images": len(embeddings),
        "embedding_dim": embeddings.shape[1],
        **values,
        "edges": np.linspace(-1, 1, config.bins + 1).tolist(),
        "pairs": _as_json(pairs),
        "attributes": {name: _as_json(described) for name, described in attributes.items()},
        "unknown_keys": given.unknown_keys if given else 0,
    }


@torch.no_grad()
def two_views(
    evaluation: Evaluation,
    rows: npt.NDArray[np.int64],
    augmentation: Augmentation,
    *,
    seed: int,
    function: ImageFunction = embed,
) -> tuple[Tensor, Tensor]:
    """What a function makes of two random views of each training image that can be decoded, float32 (R, F) each."""
    device = compute_device()
    network = copy.deepcopy(evaluation.source.network).to(device).eval()
    parts = []
    with open_loader(
        evaluation.source.train,
        (Request(0, rows[first : first + _BATCH]) for first in range(0, len(rows), _BATCH)),
        augmentation=augmentation,
        training=True,
        views=2,
        seed=seed,
        device=device,
        config=evaluation.config.loader,
    ) as loader:
        for batch in loader:
            both = torch.stack([function(network, images) for images in batch.images])
            parts.append(both[:, batch.instance_ids >= 0].cpu())
    first, second = torch.cat(parts, dim=1)
    return first, second


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
    return _summarize([cosines_N], bins)


def class_pairs(embeddings_ND: Tensor, labels_N: Tensor, *, bins: int = 100) -> tuple[Pairs, Pairs]:
    """Similarities of all pairs of rows, of the same class and of different ones.

    Args:
        embeddings_ND: Unit vectors (N, D).
        labels_N: int64 (N,); rows with a negative label have no class and are skipped.
        bins: Intervals of the histograms.

    Returns:
        Pairs of the same class, pairs of two classes.
    """
    labeled_N = labels_N >= 0

    def of(same: bool) -> Pairs:
        found = label_free.pairs(embeddings_ND[labeled_N], labels_N[labeled_N])
        return _summarize((cosines[agree == same] for cosines, agree in found), bins)

    return of(True), of(False)


def all_pairs(embeddings_ND: Tensor, *, bins: int = 100) -> Pairs:
    """Similarities of all pairs of different rows.

    Args:
        embeddings_ND: Unit vectors (N, D).
        bins: Intervals of the histogram.
    """
    return _summarize((cosines for cosines, _ in label_free.pairs(embeddings_ND)), bins)


def _as_json(pairs: dict[str, Pairs]) -> dict[str, Any]:
    return {
        name: {"counts": each.counts.tolist(), "mean": None if math.isnan(each.mean) else each.mean}
        for name, each in pairs.items()
    }


def _summarize(blocks: Iterable[Tensor], bins: int) -> Pairs:
    counts, total = torch.zeros(bins, dtype=torch.int64), 0.0
    for block in blocks:
        cosines = block.float().clamp(-1, 1)  # rounding may lead out of it
        counts += torch.histc(cosines, bins, -1, 1).long().cpu()
        total += float(cosines.sum(dtype=torch.float64))
    return Pairs(counts, total / int(counts.sum()) if counts.any() else math.nan)
