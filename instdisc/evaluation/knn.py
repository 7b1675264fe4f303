"""Weighted k-nearest-neighbor accuracy (Wu et al. 2018, section 3.4) over all labeled rows of the bank."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from instdisc.model.votes import Accuracy, count_hits
from instdisc.settings.evaluation import KnnConfig, Readout

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

logger = logging.getLogger(__name__)


def run(evaluation: Evaluation, config: KnnConfig) -> dict[str, Any]:
    """Classify every query by its nearest labeled rows.

    Raises:
        ConfigError: The bank has no labels.
    """
    queries, voters = evaluation.queries, evaluation.voters
    k = voters.neighbors(config.k or evaluation.source.own_k)
    found = knn_accuracy(evaluation, k, config.temperature)
    whitened = None
    if evaluation.can_whiten:
        whitened = knn_accuracy(evaluation, k, config.temperature, "whitened")
    accuracies = {1: knn_accuracy(evaluation, 1, config.temperature), k: found}
    if found.without_neighbor:
        logger.warning("%d queries have no labeled neighbor: they count as wrong", found.without_neighbor)
    evaluation.metrics.set(
        evaluation_knn_top1_ratio=found.top1, evaluation_knn_top5_ratio=found.top5, evaluation_knn_k=k
    )
    return {
        "summary": _figures(accuracies, whitened),
        "queries": len(queries),
        "query_kind": queries.kind,
        "rows": len(voters),
        "bank": evaluation.rows_are,
        "k": k,
        "temperature": config.temperature,
        "unknown_classes": queries.unknown,
        "without_neighbor": found.without_neighbor,
        "accuracies": {
            f"k{each}": {"top1": value.top1, "top5": value.top5, "balanced": value.balanced}
            for each, value in accuracies.items()
        },
        "whitened": whitened
        and {"top1": whitened.top1, "top5": whitened.top5, "balanced": whitened.balanced},
    }


def knn_accuracy(evaluation: Evaluation, k: int, temperature: float, readout: Readout = "plain") -> Accuracy:
    """Accuracy of the weighted vote of k neighbors."""
    voters = evaluation.voters
    scores, found = (torch.from_numpy(each) for each in evaluation.neighbors(k, readout))
    truth = torch.from_numpy(evaluation.queries.labels)
    num_classes = len(voters.sizes)
    counts = count_hits(
        scores,
        voters.labels_of(found),
        truth,
        num_classes,
        max(num_classes, int(truth.max()) + 1),
        temperature=temperature,
    )
    accuracy = Accuracy.of(counts, k)
    assert accuracy is not None
    return accuracy


def _figures(accuracies: dict[int, Accuracy], whitened: Accuracy | None) -> dict[str, float]:
    figures = {}
    for k, each in accuracies.items():
        figures[f"kNN k={k}, top-1"] = each.top1
        figures[f"kNN k={k}, top-1 balanced over classes"] = each.balanced
        if k > 1:
            figures[f"kNN k={k}, top-5"] = each.top5
    if whitened is not None:
        figures[f"kNN k={whitened.k}, top-1 whitened"] = whitened.top1
    return figures
