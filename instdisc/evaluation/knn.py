"""Weighted k-nearest-neighbor accuracy (Wu et al. 2018, section 3.4) over the whole bank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from instdisc.model.votes import ranks_of, weighted_votes
from instdisc.settings.evaluation import KnnConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_MOST_VOTES = 1 << 24  # held at a time


def run(evaluation: Evaluation, config: KnnConfig) -> dict[str, Any]:
    """Classify every query by its nearest rows.

    Raises:
        ConfigError: The bank has no labels, or fewer rows than k.
    """
    bank_labels, queries = evaluation.source.bank_labels, evaluation.queries
    scores, rows = evaluation.neighbors(config.k)
    accuracies = {
        f"k{k}": knn_accuracies(
            scores[:, :k], bank_labels[rows[:, :k]], queries.labels, temperature=config.temperature
        )
        for k in sorted({1, config.k})
    }
    evaluation.metrics.set(
        evaluation_knn_top1_ratio=accuracies[f"k{config.k}"]["top1"],
        evaluation_knn_top5_ratio=accuracies[f"k{config.k}"]["top5"],
    )
    return {
        "summary": {
            f"kNN k={k}, {top.replace('top', 'top-')}": accuracies[f"k{k}"][top]
            for k in sorted({1, config.k})
            for top in (("top1", "top5") if k > 1 else ("top1",))
        },
        "queries": len(queries),
        "query_kind": queries.kind,
        "rows": evaluation.source.snapshot.num_rows,
        "bank": "recomputed" if evaluation.config.recompute else "stored",
        "k": config.k,
        "temperature": config.temperature,
        "unknown_classes": queries.unknown,
        "accuracies": accuracies,
    }


def knn_accuracies(
    scores_QK: npt.NDArray[np.float32],
    labels_QK: npt.NDArray[np.int64],
    labels_Q: npt.NDArray[np.int64],
    *,
    temperature: float,
) -> dict[str, float]:
    """Share of the queries whose class has the most votes, and is among the five with the most.

    Args:
        scores_QK: float32 (Q, K), similarities of the neighbors, minus infinity for no neighbor.
        labels_QK: int64 (Q, K), their classes, negative for none.
        labels_Q: int64 (Q,), classes of the queries.
        temperature: τ.
    """
    num_classes = int(max(labels_QK.max(), 0)) + 1
    block = max(1, _MOST_VOTES // num_classes)
    hits = {"top1": 0, "top5": 0}
    for first in range(0, len(labels_Q), block):
        chosen = slice(first, first + block)
        votes_BC = weighted_votes(
            torch.from_numpy(scores_QK[chosen]),
            torch.from_numpy(labels_QK[chosen]),
            num_classes,
            temperature=temperature,
        )
        ranks_B = ranks_of(votes_BC, torch.from_numpy(labels_Q[chosen]))
        hits["top1"] += int((ranks_B < 1).sum())
        hits["top5"] += int((ranks_B < 5).sum())
    return {name: count / len(labels_Q) for name, count in hits.items()}
