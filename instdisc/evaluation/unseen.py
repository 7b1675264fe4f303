"""Retrieval among classes that training never saw (Ye et al. 2019): Recall@K and the NMI of clusters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from instdisc.common.classes import choose_classes
from instdisc.common.errors import ConfigError
from instdisc.evaluation.queries import open_labeled
from instdisc.model.votes import shard_top_k
from instdisc.settings.evaluation import UnseenConfig
from pipelines.manifest import Manifest

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_QUERIES_AT_A_TIME = 1024

logger = logging.getLogger(__name__)


def run(evaluation: Evaluation, config: UnseenConfig) -> dict[str, Any]:
    """Retrieve images of held-out classes among one another.

    Raises:
        ConfigError: The split does not fit the images, or too few images are left.
    """
    manifest = _images(evaluation, config)
    present = {
        evaluation.source.train.class_names[label]
        for label in np.unique(evaluation.source.train.labels)
        if label >= 0
    }
    held_out = _held_out(manifest, config, present)
    labels = np.asarray(manifest.labels, dtype=np.int64)
    rows = np.flatnonzero(np.isin(labels, [manifest.class_names.index(name) for name in held_out]))
    if not len(rows):
        raise ConfigError(f"{manifest.root} has no images of the {len(held_out)} classes to retrieve among")
    embeddings = evaluation.compute(manifest, rows=rows)
    decoded = np.isfinite(embeddings[:, 0])
    embeddings, labels = embeddings[decoded], labels[rows[decoded]]
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            f"{manifest.root} has images of {len(np.unique(labels))} of the {len(held_out)} classes to retrieve among, "
            "expected two or more"
        )
    seen = [name for name in held_out if name in present]
    if seen:
        logger.warning(
            "%d of the %d held-out classes are among the training images, e.g. %s: they are not unseen",
            len(seen),
            len(held_out),
            seen[0],
        )
    recalls = recall_at(embeddings, labels, config.ranks)
    nmi = cluster_nmi(embeddings, labels, seed=config.seed, starts=config.clusterings)
    return {
        "summary": {**{f"Recall@{k}": value for k, value in recalls.items()}, "NMI": nmi},
        "classes": held_out,
        "classes_seen_in_training": seen,
        "images": len(labels),
        "recall": {str(k): value for k, value in recalls.items()},
        "nmi": nmi,
    }


def _held_out(manifest: Manifest, config: UnseenConfig, trained: set[str]) -> list[str]:
    """Names of the classes to retrieve among."""
    if config.classes is not None:
        held_out = choose_classes(manifest.class_names, config.classes)
        remedy = "name more in --unseen.classes"
    else:
        held_out = [name for name in manifest.class_names if name not in trained]
        remedy = "train with --data.classes first-half, or choose classes with --unseen.classes"
    if len(held_out) < 2:
        raise ConfigError(
            f"{len(held_out)} of the {len(manifest.class_names)} classes of {manifest.root} are left to retrieve "
            f"among, expected two or more: {remedy}"
        )
    return held_out


def _images(evaluation: Evaluation, config: UnseenConfig) -> Manifest:
    """The labeled images; unlike the queries of kNN they need not have a class in common with the bank."""
    if config.path is not None:
        manifest = open_labeled(
            config.path,
            evaluation.config.queries,
            "--unseen.path",
            upright=evaluation.source.turns_images,
        )
    elif evaluation.source.test_images is not None:
        manifest = Manifest.load(evaluation.source.test_images)
    else:
        raise ConfigError("the run has no test images to retrieve among: name some with --unseen.path")
    if not manifest.has_labels:
        raise ConfigError(f"the images of {manifest.root} have no labels: retrieval needs labeled ones")
    return manifest


def recall_at(
    embeddings_ND: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], ranks: Sequence[int]
) -> dict[int, float]:
    """Share of the rows that find a row of their class among the K most similar others.

    Args:
        embeddings_ND: Unit vectors (N, D).
        labels_N: (N,), 0 or above. A row that is the only one of its class counts as a miss.
        ranks: K.

    Raises:
        ConfigError: Not more rows than the largest K.
    """
    most = max(ranks)
    if len(labels_N) <= most:
        raise ConfigError(
            f"Recall@{most} needs more than {most} images, {len(labels_N)} are of the classes retrieved among: give "
            "more images or lower --unseen.ranks"
        )
    rows, labels = torch.from_numpy(embeddings_ND), torch.from_numpy(labels_N)
    found = torch.zeros(most, dtype=torch.int64)
    for first in range(0, len(rows), _QUERIES_AT_A_TIME):
        own = torch.arange(first, min(first + _QUERIES_AT_A_TIME, len(rows)))
        _, nearest = shard_top_k(rows[own], rows, most, excluded_G=own)
        found += (labels[nearest] == labels[own, None]).cumsum(dim=1).clamp(max=1).sum(dim=0)
    return {k: int(found[k - 1]) / len(rows) for k in ranks}


def cluster_nmi(
    embeddings_ND: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], *, seed: int, starts: int
) -> float:
    """Normalized mutual information, 0 to 1, of the classes and as many clusters found by k-means.

    The information is divided by the arithmetic mean of both entropies, as is usual in retrieval.

    Args:
        embeddings_ND: Unit vectors (N, D).
        labels_N: (N,).
        seed: Of the first centers.
        starts: Runs of k-means, the tightest of which counts.
    """
    from sklearn.cluster import KMeans  # not at the top: it takes a second
    from sklearn.metrics import normalized_mutual_info_score

    clustering = KMeans(len(np.unique(labels_N)), n_init=starts, random_state=seed)
    return float(normalized_mutual_info_score(labels_N, clustering.fit_predict(embeddings_ND)))
