"""The invariant and spreading instance feature (Ye et al. 2019): two views, no bank, the batch tells itself apart.

With f_i the embedding of an image and f̂_i that of its second view, both of the global batch,

    J = -Σ_i log P(i|f̂_i) - Σ_i Σ_{j≠i} log(1 - P(i|f_j)),
    P(i|f̂_i) = exp(f_i·f̂_i/τ) / Σ_k exp(f_k·f̂_i/τ),   P(i|f_j) = exp(f_i·f_j/τ) / Σ_k exp(f_k·f_j/τ).

That is the form `paper`. In the form `symmetric`, that of the authors' code, all 2B embeddings are queries and keys
alike: the positive of a query is the other view of its image, everything but itself is in its denominator.

Each rank owns its own embeddings as keys. A query's denominator, and three more sums over its keys, are agreed on by
the owners; then every term is local. What a key's own gradient is due, it gets from the queries of all ranks, which
its owner has.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective
from instdisc.settings.objectives import SpreadingConfig

# Above this probability, which one key has at most, `1 - P` as a difference could lose what is left for the others.
_TOP = 0.6


class Spreading(Objective):
    """The objective; it has no state and leaves the bank to follow the embeddings.

    Args:
        config: Settings.
        num_instances: n.
        bank: This rank's rows.
    """

    def __init__(self, config: SpreadingConfig, num_instances: int, bank: Bank) -> None:
        self.config: SpreadingConfig = config

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """Gradient, loss and similarity to the positive; see `Objective.shard_terms`. An image is in a batch only once.

        Probabilities are worked out in float64: they are few. However near to 1 one of them is, `1 - P` is the mass of
        all other keys, and so is what depends on it.
        """
        temperature = self.config.temperature
        queries_GD = queries.embeddings_GD.float()
        keys_QD = queries_GD[queries.local]
        pairs = _pairs(queries, self.config.form)
        similarities_GQ = queries_GD @ keys_QD.T
        scores_GQ = (similarities_GQ.double() / temperature).masked_fill(~pairs.compared_GQ, -torch.inf)
        log_partition_G = merge_log_sums(torch.logsumexp(scores_GQ, dim=1))
        # A query without an image is compared with nothing.
        log_partition_G = log_partition_G.masked_fill(log_partition_G == -torch.inf, 0)
        log_probability_GQ = scores_GQ - log_partition_G[:, None]
        probability_GQ = torch.exp(log_probability_GQ)
        is_top_GQ = probability_GQ > _TOP
        log_rest_G = merge_log_sums(torch.logsumexp(scores_GQ.masked_fill(is_top_GQ, -torch.inf), dim=1))
        log_complement_GQ = torch.where(
            is_top_GQ, (log_rest_G - log_partition_G)[:, None], torch.log1p(-probability_GQ)
        )
        log_odds_GQ = (log_probability_GQ - log_complement_GQ).masked_fill(~pairs.negative_GQ, -torch.inf)
        log_odds_2GQ = torch.stack(
            [log_odds_GQ.masked_fill(is_top_GQ, -torch.inf), log_odds_GQ.masked_fill(~is_top_GQ, -torch.inf)]
        )
        odds_of_rest_G, odds_of_top_G = torch.exp(merge_log_sums(torch.logsumexp(log_odds_2GQ, dim=2)))
        # Of all negatives but the key itself.
        odds_of_others_GQ = odds_of_rest_G[:, None] + torch.where(
            is_top_GQ, 0, odds_of_top_G[:, None] - torch.exp(log_odds_GQ)
        )
        # How the loss of each query changes with each of its scores.
        slope_GQ = probability_GQ * (pairs.attracted_G[:, None] - odds_of_others_GQ)
        slope_GQ += torch.where(pairs.negative_GQ, probability_GQ, 0) - pairs.positive_GQ.double()
        slope_GQ = slope_GQ.float() / temperature
        terms = queries_GD.new_empty(len(queries_GD), queries_GD.shape[1] + 2)
        terms[:, :-2] = slope_GQ @ keys_QD
        if self.config.key_gradient:
            terms[queries.local, :-2] += slope_GQ.T @ queries_GD
        loss_GQ = torch.where(pairs.positive_GQ, -log_probability_GQ, 0)
        loss_GQ -= torch.where(pairs.negative_GQ, log_complement_GQ, 0)
        terms[:, -2] = loss_GQ.sum(dim=1)
        terms[:, -1] = torch.where(pairs.other_view_GQ, similarities_GQ, 0).sum(dim=1)
        return terms


class _Pairs(NamedTuple):
    """What queries and this rank's keys are to each other.

    Attributes:
        compared_GQ: The key is in the query's denominator.
        positive_GQ: The query is attracted by the key.
        negative_GQ: The query is repelled by the key.
        other_view_GQ: They show the same image.
        attracted_G: float64, 1 where the query has a positive, on whichever rank, else 0.
    """

    compared_GQ: Tensor
    positive_GQ: Tensor
    negative_GQ: Tensor
    other_view_GQ: Tensor
    attracted_G: Tensor


def _pairs(queries: BatchQueries, form: Literal["symmetric", "paper"]) -> _Pairs:
    ids_G = queries.instance_ids_G
    number_G = torch.arange(len(ids_G), device=ids_G.device)
    per_view = (queries.local.stop - queries.local.start) // queries.views
    is_first_G = number_G // per_view % queries.views == 0
    present_G = ids_G >= 0
    ids_Q, number_Q, is_first_Q = ids_G[queries.local], number_G[queries.local], is_first_G[queries.local]
    present_GQ = present_G[:, None] & present_G[queries.local]
    same_image_GQ = present_GQ & (ids_G[:, None] == ids_Q)
    different_GQ = present_GQ & (number_G[:, None] != number_Q)
    other_view_GQ = same_image_GQ & different_GQ
    if form == "symmetric":
        negative_GQ = different_GQ & ~same_image_GQ
        return _Pairs(different_GQ, other_view_GQ, negative_GQ, other_view_GQ, present_G.double())
    compared_GQ = present_GQ & is_first_Q
    positive_GQ = same_image_GQ & compared_GQ & ~is_first_G[:, None]
    negative_GQ = compared_GQ & ~same_image_GQ & is_first_G[:, None]
    attracted_G = (present_G & ~is_first_G).double()
    return _Pairs(compared_GQ, positive_GQ, negative_GQ, other_view_GQ, attracted_G)
