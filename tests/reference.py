"""The formulas of the design in float64, written from the papers, one image at a time and without any trick."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def nce(
    f: Array,
    positive: Array,
    negatives: Array,
    weights: Array,
    *,
    num_instances: int,
    num_negatives: int,
    temperature: float,
    partition: float,
    proximal_weight: float,
) -> tuple[float, Array, float]:
    """Noise-contrastive estimation of one image (Wu et al. 2018, section 3.2).

    Args:
        f: (D,), the embedding.
        positive: (D,), its row of the bank.
        negatives: (K, D), the sampled rows.
        weights: (K,), how often each sampled row counts; all 1 for plain sampling.
        num_instances: n.
        num_negatives: m.
        temperature: τ.
        partition: Z.
        proximal_weight: λ.

    Returns:
        Loss, its gradient by f (D,), and the estimate n/m Σ exp(v·f/τ) of Z.
    """
    noise = num_negatives / num_instances

    def h(row: Array) -> float:
        probability = np.exp(row @ f / temperature) / partition
        return float(probability / (probability + noise))

    difference = f - positive
    loss = -np.log(h(positive)) + proximal_weight * difference @ difference
    gradient = -(1 - h(positive)) / temperature * positive + 2 * proximal_weight * difference
    mass = 0.0
    for row, weight in zip(negatives, weights, strict=True):
        loss -= weight * np.log(1 - h(row))
        gradient = gradient + weight * h(row) / temperature * row
        mass += weight * np.exp(row @ f / temperature)
    return float(loss), gradient, float(num_instances / num_negatives * mass)


def bank_update(row: Array, embedding: Array, momentum: float) -> Array:
    """The row of an instance after its step."""
    mixed = momentum * row + (1 - momentum) * embedding
    return mixed / np.linalg.norm(mixed)


def weighted_knn(
    query: Array, rows: Array, labels: npt.NDArray[np.int64], num_classes: int, *, k: int, temperature: float
) -> Array:
    """Votes of the k most similar rows for every class (Wu et al. 2018, section 3.4)."""
    similarities = rows @ query
    votes = np.zeros(num_classes)
    for row in np.argsort(-similarities, kind="stable")[:k]:
        votes[labels[row]] += np.exp(similarities[row] / temperature)
    return votes


def without_one_of_every_class(
    labels: npt.NDArray[np.int64], turns: npt.NDArray[np.int64], query: int
) -> npt.NDArray[np.int64]:
    """Rows that may vote for a row: all but itself and, of every other class, the one whose turn it is.

    Args:
        labels: (n,).
        turns: (n,), place of each row in the order of its class.
        query: The row.
    """
    kept = []
    for row, label in enumerate(labels):
        size = int((labels == label).sum())
        if turns[row] != turns[query] % size:
            kept.append(row)
    assert query not in kept
    return np.array(kept, np.int64)


def softmax(
    f: Array, positive: int, bank: Array, *, temperature: float, proximal_weight: float
) -> tuple[float, Array]:
    """The non-parametric softmax of one image over all rows of the bank (Wu et al. 2018, Eq. 2).

    Args:
        f: (D,), the embedding.
        positive: Its instance id.
        bank: (n, D).
        temperature: τ.
        proximal_weight: λ.

    Returns:
        Loss and its gradient by f (D,).
    """
    scores = bank @ f / temperature
    log_partition = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    probabilities = np.exp(scores - log_partition)
    difference = f - bank[positive]
    loss = log_partition - scores[positive] + proximal_weight * difference @ difference
    gradient = (probabilities @ bank - bank[positive]) / temperature + 2 * proximal_weight * difference
    return float(loss), gradient


def infonce(
    f: Array,
    positive: Array,
    negatives: Array,
    weights: Array,
    *,
    temperature: float,
    proximal_weight: float,
) -> tuple[float, Array]:
    """The softmax of one image's positive against sampled rows (van den Oord et al. 2018, Eq. 4).

    Args:
        f: (D,), the embedding.
        positive: (D,), its row of the bank.
        negatives: (K, D), the sampled rows but the positive itself.
        weights: (K,), how often each sampled row counts.
        temperature: τ.
        proximal_weight: λ.

    Returns:
        Loss and its gradient by f (D,).
    """
    rows = np.concatenate([positive[None], negatives])
    scores = rows @ f / temperature
    masses = np.exp(scores - scores.max()) * np.concatenate([[1.0], weights])
    probabilities = masses / masses.sum()
    difference = f - positive
    loss = -np.log(probabilities[0]) + proximal_weight * difference @ difference
    gradient = (probabilities @ rows - positive) / temperature + 2 * proximal_weight * difference
    return float(loss), gradient


def spreading_paper(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The loss of a batch, a sum over its images (Ye et al. 2019, section 3.2), for automatic differentiation.

    Args:
        first: float64 (B, D), f.
        second: float64 (B, D), f̂.
        temperature: τ.
    """
    loss = first.new_zeros(())
    for i in range(len(first)):
        loss = loss - torch.log_softmax(first @ second[i] / temperature, dim=0)[i]
        for j in range(len(first)):
            if j != i:
                loss = loss - log_complement(first @ first[j] / temperature, i)
    return loss


def spreading_symmetric(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The loss of a batch as the authors' code has it, a sum over its 2B embeddings.

    Args:
        queries: float64 (2B, D), first all first views, then all second ones.
        keys: The same numbers, detached where keys are constants.
        temperature: τ.
    """
    count = len(queries)
    loss = queries.new_zeros(())
    for query in range(count):
        others = [key for key in range(count) if key != query]
        scores = keys[others] @ queries[query] / temperature
        for number, key in enumerate(others):
            is_positive = key == (query + count // 2) % count
            chosen = (
                torch.log_softmax(scores, dim=0)[number] if is_positive else log_complement(scores, number)
            )
            loss = loss - chosen
    return loss


def log_complement(scores: Tensor, number: int) -> Tensor:
    """`log(1 - P)` of one of the scores (K,) under their softmax: the others' share, however small."""
    others = torch.cat([scores[:number], scores[number + 1 :]])
    return torch.logsumexp(others, dim=0) - torch.logsumexp(scores, dim=0)
