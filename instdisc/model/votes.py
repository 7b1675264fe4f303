"""Weighted k-nearest-neighbor classification (Wu et al. 2018, section 3.4), on local tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 24  # similarities held at a time: 64 MB of float32
# Neighbors beyond k, so that of equal similarities at the end the same rows count in every program.
_SPARE = 8


def shard_top_k(
    queries_GD: Tensor, rows_SD: Tensor, k: int, *, excluded_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of one shard that are most similar to each query.

    Args:
        queries_GD: float32 (G, D).
        rows_SD: (S, D), of any floating type; they are compared in float32.
        k: Neighbors per query, at least 1.
        excluded_G: int64 (G,), position of a row that does not count for the query, negative for none.

    Returns:
        Similarities, float32 (G, k), largest first, and positions in the shard, int64 (G, k), ascending where
        similarities are equal. Where the shard has fewer than k rows the rest is minus infinity at position -1.
    """
    block = max(1, _BLOCK_ENTRIES // len(queries_GD))
    best = queries_GD.new_full((len(queries_GD), k), -torch.inf, dtype=torch.float32)
    best_positions = torch.full_like(best, -1, dtype=torch.int64)
    for first in range(0, len(rows_SD), block):
        rows_bD = rows_SD[first : first + block]
        scores_Gb = queries_GD @ rows_bD.to(queries_GD.dtype).T
        if excluded_G is not None:
            # Not by a mask, whose number of entries a GPU would be waited for.
            inside_G1 = ((excluded_G >= first) & (excluded_G < first + len(rows_bD)))[:, None]
            places_G1 = (excluded_G - first).clamp(0, len(rows_bD) - 1)[:, None]
            kept_G1 = scores_Gb.gather(1, places_G1)
            scores_Gb.scatter_(1, places_G1, kept_G1.masked_fill(inside_G1, -torch.inf))
        scores, positions = scores_Gb.topk(min(k + _SPARE, len(rows_bD)), dim=1)
        best, best_positions = nearest(
            torch.cat([best, scores], dim=1), torch.cat([best_positions, positions + first], dim=1), k
        )
    return best, best_positions.masked_fill(best == -torch.inf, -1)


def nearest(scores_GK: Tensor, positions_GK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their positions, those of lower number first where scores are equal."""
    positions_GK, by_position = positions_GK.sort(dim=1)
    scores_GK, by_score = scores_GK.gather(1, by_position).sort(dim=1, descending=True, stable=True)
    return scores_GK[:, :k], positions_GK.gather(1, by_score)[:, :k]


def weighted_votes(
    similarities_BK: Tensor, labels_BK: Tensor, num_classes: int, *, temperature: float
) -> Tensor:
    """Votes for every class: each neighbor gives its class `exp(similarity / τ)`.

    Votes are relative to the nearest neighbor's, so that no temperature overflows; the order of classes is the same.

    Args:
        similarities_BK: float32 (B, K), minus infinity for no neighbor.
        labels_BK: int64 (B, K), negative where the neighbor has no label; it then gives no vote.
        num_classes: C.
        temperature: τ, above 0.

    Returns:
        float64 (B, C).
    """
    counted = (labels_BK >= 0) & (similarities_BK > -torch.inf)
    top_B1 = similarities_BK.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True)
    weights_BK = torch.where(counted, torch.exp((similarities_BK - top_B1).double() / temperature), 0)
    votes_BC = weights_BK.new_zeros(len(labels_BK), num_classes)
    return votes_BC.scatter_add_(1, labels_BK.clamp(min=0), weights_BK)


def ranks_of(votes_BC: Tensor, labels_BK: Tensor, truth_B: Tensor) -> Tensor:
    """How many classes come before the right one; of classes with equal votes that of the nearest neighbor comes first.

    Args:
        votes_BC: float (B, C), 0 or above.
        labels_BK: int64 (B, K), the classes of the neighbors, nearest first; negative for none.
        truth_B: int64 (B,), 0 or above; C and above are classes that no vote can name.

    Returns:
        int64 (B,); a number above any where the right class has no vote, so that top-t accuracy is the share of ranks
        below t.
    """
    num_classes, num_neighbors = votes_BC.shape[1], labels_BK.shape[1]
    own_B1 = truth_B.clamp(max=num_classes - 1)[:, None]
    places_BK = torch.arange(num_neighbors, device=labels_BK.device).expand_as(labels_BK)
    places_BK = places_BK.masked_fill(labels_BK < 0, num_neighbors)
    first_BC = torch.full_like(votes_BC, num_neighbors, dtype=torch.int64)
    first_BC.scatter_reduce_(1, labels_BK.clamp(min=0), places_BK, "amin")
    own_votes_B1 = votes_BC.gather(1, own_B1)
    tied_BC = (votes_BC == own_votes_B1) & (first_BC < first_BC.gather(1, own_B1))
    lost_B = (truth_B >= num_classes) | (own_votes_B1[:, 0] <= 0)
    before_B = ((votes_BC > own_votes_B1) | tied_BC).sum(dim=1)
    return before_B.masked_fill(lost_B, torch.iinfo(torch.int64).max)


def count_hits(
    scores_QK: Tensor,
    labels_QK: Tensor,
    truth_Q: Tensor,
    num_classes: int,
    num_truths: int,
    *,
    temperature: float,
) -> Tensor:
    """Classify queries by their neighbors and count, for every class of the queries, how many are right.

    Args:
        scores_QK: float32 (Q, K), largest first, minus infinity for no neighbor.
        labels_QK: int64 (Q, K), their classes.
        truth_Q: int64 (Q,), the queries' own; negative for queries that do not count.
        num_classes: C, of the neighbors.
        num_truths: T, of the queries: those that no neighbor has are numbered from C on.
        temperature: τ.

    Returns:
        float64 (4, T): queries, those right, those with the right class among the five with the most votes, and those
        that have no neighbor, which are wrong. What ranks count may be added up.
    """
    counts_4T = torch.zeros(4, num_truths, dtype=torch.float64, device=scores_QK.device)
    block = max(1, _BLOCK_ENTRIES // num_classes)
    for chosen in (slice(first, first + block) for first in range(0, len(truth_Q), block)):
        scores_BK, labels_BK, truth_B = scores_QK[chosen], labels_QK[chosen], truth_Q[chosen]
        votes_BC = weighted_votes(scores_BK, labels_BK, num_classes, temperature=temperature)
        ranks_B = ranks_of(votes_BC, labels_BK, truth_B.clamp(min=0))
        alone_B = (scores_BK == -torch.inf).all(dim=1)
        found_4B = torch.stack([torch.ones_like(alone_B), ranks_B < 1, ranks_B < 5, alone_B])
        counts_4T.index_add_(1, truth_B.clamp(min=0), (found_4B & (truth_B >= 0)).double())
    return counts_4T


@dataclass(frozen=True)
class Accuracy:
    """Of a classification; shares of 1."""

    top1: float
    top5: float
    balanced: float
    """Mean over the classes of the queries of each one's top-1."""
    queries: int
    without_neighbor: int
    """Queries that no row could vote for; they count as wrong."""
    k: int
    """Neighbors that voted."""

    @classmethod
    def of(cls, counts_4T: Tensor, k: int) -> Accuracy | None:
        """From what `count_hits` counted; None without a query."""
        queries_T, top1_T, top5_T, alone_T = counts_4T.cpu()
        total = queries_T.sum()
        if not total:
            return None
        asked_T = queries_T > 0
        return cls(
            top1=float(top1_T.sum() / total),
            top5=float(top5_T.sum() / total),
            balanced=float((top1_T[asked_T] / queries_T[asked_T]).mean()),
            queries=int(total),
            without_neighbor=int(alone_T.sum()),
            k=k,
        )
