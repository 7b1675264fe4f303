"""Weighted k-nearest-neighbor classification (Wu et al. 2018, section 3.4), on local tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 24  # similarities held at a time: 64 MB of float32


def shard_top_k(
    queries_GD: Tensor, rows_SD: Tensor, k: int, *, excluded_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of one shard that are most similar to each query.

    Args:
        queries_GD: (G, D).
        rows_SD: (S, D).
        k: Neighbors per query, at least 1.
        excluded_G: int64 (G,), position of a row that does not count for the query, negative for none.

    Returns:
        Similarities, float32 (G, k), largest first, and positions in the shard, int64 (G, k). Where the shard has
        fewer than k rows the rest is minus infinity at position -1.
    """
    block = max(1, _BLOCK_ENTRIES // len(queries_GD))
    best = queries_GD.new_full((len(queries_GD), k), -torch.inf, dtype=torch.float32)
    best_positions = torch.full_like(best, -1, dtype=torch.int64)
    for first in range(0, len(rows_SD), block):
        rows_bD = rows_SD[first : first + block]
        scores_Gb = (queries_GD.to(rows_bD.dtype) @ rows_bD.T).float()
        if excluded_G is not None:
            # Not by a mask, whose number of entries a GPU would be waited for.
            inside_G1 = ((excluded_G >= first) & (excluded_G < first + len(rows_bD)))[:, None]
            places_G1 = (excluded_G - first).clamp(0, len(rows_bD) - 1)[:, None]
            kept_G1 = scores_Gb.gather(1, places_G1)
            scores_Gb.scatter_(1, places_G1, kept_G1.masked_fill(inside_G1, -torch.inf))
        scores, positions = scores_Gb.topk(min(k, len(rows_bD)), dim=1)
        best, chosen = torch.cat([best, scores], dim=1).topk(k, dim=1)
        best_positions = torch.cat([best_positions, positions + first], dim=1).gather(1, chosen)
    return best, best_positions.masked_fill(best == -torch.inf, -1)


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
        float32 (B, C).
    """
    counted = (labels_BK >= 0) & (similarities_BK > -torch.inf)
    top_B1 = similarities_BK.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True)
    weights_BK = torch.where(counted, torch.exp((similarities_BK - top_B1) / temperature), 0)
    votes_BC = torch.zeros(len(labels_BK), num_classes, device=labels_BK.device)
    return votes_BC.scatter_add_(1, labels_BK.clamp(min=0), weights_BK)


def ranks_of(votes_BC: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes come before the right one; of classes with equal votes the one of lower number comes first.

    Args:
        votes_BC: float (B, C), 0 or above.
        labels_B: int64 (B,), 0 or above; C and above are classes that no vote can name.

    Returns:
        int64 (B,); a number above any where the right class has no vote, so that top-t accuracy is the share of ranks
        below t.
    """
    num_classes = votes_BC.shape[1]
    own_B1 = votes_BC.gather(1, labels_B.clamp(max=num_classes - 1)[:, None])
    classes_C = torch.arange(num_classes, device=votes_BC.device)
    before_BC = (votes_BC > own_B1) | ((votes_BC == own_B1) & (classes_C < labels_B[:, None]))
    lost_B = (labels_B >= num_classes) | (own_B1[:, 0] <= 0)
    return before_BC.sum(dim=1).masked_fill(lost_B, torch.iinfo(torch.int64).max)
