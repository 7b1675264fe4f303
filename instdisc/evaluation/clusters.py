"""Clusters of images by spherical k-means, and the images at their centres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.topk import RowSource
from instdisc.common.errors import ConfigError
from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.settings.evaluation import ClustersConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_ROWS = 65_536  # read at a time
_ROWS_PER_CLUSTER = 256  # that the centres are found with
_LEAST_ROWS_PER_CLUSTER = 4
_CENTRAL = 50  # rows of a cluster that the results name


class Clusters(NamedTuple):
    """A clustering of N rows into K clusters, the largest first."""

    cluster_N: npt.NDArray[np.int64]
    """int64 (N,), -1 for a row that is not finite."""
    similarity_N: npt.NDArray[np.float32]
    """float32 (N,), cosine of each row and the centre of its cluster; 0 for a row without one."""
    sizes_K: npt.NDArray[np.int64]
    """int64 (K,), rows of each cluster, at least 1."""

    def central(self, cluster: int, count: int) -> npt.NDArray[np.int64]:
        """The rows nearest to the centre, int64 (at most count,)."""
        rows = np.flatnonzero(self.cluster_N == cluster)
        return rows[np.argsort(-self.similarity_N[rows], kind="stable")[:count]]


def run(evaluation: Evaluation, config: ClustersConfig) -> dict[str, Any]:
    """Write `clusters.csv` and `clusters.parquet`: of every image, for each number of clusters, its cluster.

    Raises:
        ConfigError: Every number of clusters is above 2 and has fewer than four images for a cluster.
    """
    rows, source = evaluation.compared_rows, evaluation.source
    columns: dict[str, npt.NDArray[Any]] = {}
    found: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for count in _counts(rows.num_rows, config):
        clusters = spherical_k_means(rows, count, seed=config.seed)
        columns[f"cluster_{count}"] = clusters.cluster_N
        columns[f"similarity_{count}"] = clusters.similarity_N
        nmi = _nmi(evaluation, clusters)
        found[str(count)] = {
            "sizes": clusters.sizes_K.tolist(),
            "mean_similarity": float(clusters.similarity_N[clusters.cluster_N >= 0].mean()),
            "nmi": nmi,
            "central": [
                [
                    {"row": int(row), "similarity": float(clusters.similarity_N[row])}
                    for row in clusters.central(cluster, _CENTRAL)
                ]
                for cluster in range(len(clusters.sizes_K))
            ],
        }
        largest = f"{len(clusters.sizes_K)} clusters, images of the largest"
        summary[largest] = int(clusters.sizes_K[0])
        if nmi is not None:
            summary[f"{len(clusters.sizes_K)} clusters, NMI with the classes"] = nmi
    write_table(evaluation.output / "clusters", {**image_columns(source.train), **columns})
    return {"summary": summary, "clusters": found}


def _counts(num_rows: int, config: ClustersConfig) -> list[int]:
    most = max(2, num_rows // _LEAST_ROWS_PER_CLUSTER)
    counts = [count for count in dict.fromkeys(config.counts) if count <= most]
    if not counts:
        raise ConfigError(
            f"{num_rows} images are too few for {min(config.counts)} clusters: give --clusters.counts {most}"
        )
    return counts


def _nmi(evaluation: Evaluation, clusters: Clusters) -> float | None:
    """Normalised mutual information of clusters and classes, 0 to 1; None without labels."""
    if not evaluation.source.has_labels:
        return None
    from sklearn.metrics import normalized_mutual_info_score  # not at the top: it takes a second

    labels = evaluation.source.bank_labels
    counted = (labels >= 0) & (clusters.cluster_N >= 0)
    return float(normalized_mutual_info_score(labels[counted], clusters.cluster_N[counted]))


def spherical_k_means(rows: RowSource, count: int, *, seed: int) -> Clusters:
    """Cluster unit vectors by their cosine (Dhillon and Modha 2001), by faiss.

    The centres are found with at most 256 rows for each, spread evenly; then every row is given to the most similar
    one. Two passes over the rows, of which 65,536 are held at a time. Centres that no row is given to are dropped.

    Args:
        rows: N unit vectors; one of NaN is in no cluster.
        count: K, 1 to N.
        seed: Of the first centres.
    """
    import faiss  # not at the top: it starts threads

    sample = _spread(rows, _ROWS_PER_CLUSTER * count)
    k_means = faiss.Kmeans(
        sample.shape[1],
        min(count, len(sample)),
        niter=25,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_ROWS_PER_CLUSTER,
    )
    k_means.train(sample)
    assert k_means.centroids is not None
    centres_DK = np.ascontiguousarray(k_means.centroids.T)
    cluster_N = np.full(rows.num_rows, -1, np.int64)
    similarity_N = np.zeros(rows.num_rows, np.float32)
    for start in range(0, rows.num_rows, _ROWS):
        block = rows.read(start, min(start + _ROWS, rows.num_rows)).astype(np.float32, copy=False)
        there = np.flatnonzero(np.isfinite(block[:, 0]))
        cosines = block[there] @ centres_DK
        nearest = cosines.argmax(axis=1)
        cluster_N[start + there] = nearest
        similarity_N[start + there] = cosines[np.arange(len(there)), nearest]
    sizes = np.bincount(cluster_N[cluster_N >= 0], minlength=centres_DK.shape[1])
    order = np.argsort(-sizes, kind="stable")
    number = np.empty(len(sizes) + 1, np.int64)
    number[order], number[-1] = np.arange(len(sizes)), -1
    return Clusters(number[cluster_N], similarity_N, sizes[order][sizes[order] > 0])


def _spread(rows: RowSource, most: int) -> npt.NDArray[np.float32]:
    """Up to `most` rows that are spread evenly, without those of NaN, float32 (M, D)."""
    chosen = np.linspace(0, rows.num_rows - 1, min(rows.num_rows, most)).astype(np.int64)
    parts = []
    for start in range(0, rows.num_rows, _ROWS):
        stop = min(start + _ROWS, rows.num_rows)
        own = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, stop)] - start
        parts.append(rows.read(start, stop)[own].astype(np.float32, copy=False))
    sample = np.concatenate(parts)
    return np.ascontiguousarray(sample[np.isfinite(sample[:, 0])])
