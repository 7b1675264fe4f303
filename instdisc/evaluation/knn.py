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
    features = None
    if evaluation.recomputes and queries.manifest is not None:
        features = knn_accuracy(evaluation, k, config.temperature, "features")
    accuracies = {1: knn_accuracy(evaluation, 1, config.temperature), k: found}
    if found.without_neighbor:
        logger.warning("%d queries have no labeled neighbor: they count as wrong", found.without_neighbor)
    evaluation.metrics.set(
        evaluation_knn_top1_ratio=found.top1, evaluation_knn_top5_ratio=found.top5, evaluation_knn_k=k
    )
    return {
        "summary": _figures(accuracies, {"whitened": whitened, "features": features}),
        "queries": len(queries),
        "query_kind": queries.kind,
        "rows": len(voters),
        "bank": evaluation.rows_are,
        "k": k,
        "temperature": config.temperature,
        "unknown_classes": queries.unknown,
        "without_neighbor": found.without_neighbor,
        "accuracies": {f"k{each}": _as_json(value) for each, value in accuracies.items()},
        "whitened": whitened and _as_json(whitened),
        "features": features and _as_json(features),
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


def _as_json(accuracy: Accuracy) -> dict[str, float]:
    return {"top1": accuracy.top1, "top5": accuracy.top5, "balanced": accuracy.balanced}


def _figures(accuracies: dict[int, Accuracy], readouts: dict[str, Accuracy | None]) -> dict[str, float]:
    figures = {}
    for k, each in accuracies.items():
        figures[f"kNN k={k}, top-1"] = each.top1
        figures[f"kNN k={k}, top-1 balanced over classes"] = each.balanced
        if k > 1:
            figures[f"kNN k={k}, top-5"] = each.top5
    for name, accuracy in readouts.items():
        if accuracy is not None:
            figures[f"kNN k={accuracy.k}, top-1 {name}"] = accuracy.top1
    return figures
