"""The non-parametric softmax over every instance (Wu et al. 2018, Eq. 2), exact, whatever their number.

    P(i|f) = exp(v_i·f/τ) / Σ_j exp(v_j·f/τ),   J = -log P(i|f_i) + λ ‖f_i - v_i‖²

With unit rows its gradient is `(attention(f, V, V) - v_i) / τ` and its loss `logsumexp - v_i·f/τ`. A shard's attention
output counts by its share of the whole sum, so owners only need to agree on one number per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instdisc.model.bank import Bank
from instdisc.objectives.attention import attend
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective
from instdisc.settings.objectives import SoftmaxConfig


class Softmax(Objective):
    """The objective; it has no state. Over a half-precision bank its loss is known to eps/τ; by that it may be below 0.

    Args:
        config: Settings.
        num_instances: n; every row takes part, whatever their number.
        bank: This rank's rows.
    """

    def __init__(self, config: SoftmaxConfig, num_instances: int, bank: Bank) -> None:
        self.config: SoftmaxConfig = config

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """Gradient, loss and similarity to the positive; see `Objective.shard_terms`."""
        attended_GD, log_sum_G = attend(queries.embeddings_GD, bank.rows, self.config.temperature)
        log_partition_G = merge_log_sums(log_sum_G)
        share_G = torch.exp(log_sum_G - log_partition_G)
        return softmax_terms(queries, bank, attended_GD * share_G[:, None], log_partition_G, self.config)


def softmax_terms(
    queries: BatchQueries, bank: Bank, attended_GD: Tensor, log_partition_G: Tensor, config: SoftmaxConfig
) -> Tensor:
    """An owner's terms of any softmax in which a query's positive is its row of the bank.

    Args:
        queries: Of all ranks.
        bank: This rank's rows.
        attended_GD: float32 (G, D), `Σ_j P(j|f) v_j` over this owner's rows.
        log_partition_G: float32 (G,), the logarithm of the denominator of P, the same on all owners.
        config: Settings.

    Returns:
        float32 (G, D + 2): gradient, loss, similarity to the positive; the last two are 0 where another rank owns the
        positive.
    """
    dim, temperature, proximal = attended_GD.shape[1], config.temperature, config.proximal_weight
    positions_G, owned_G = bank.local(queries.instance_ids_G)
    queries_GD, rows_GD = queries.embeddings_GD.float(), bank.rows[positions_G].float()
    similarity_G, difference_GD = (queries_GD * rows_GD).sum(dim=1), queries_GD - rows_GD
    gradient_GD = 2 * proximal * difference_GD - rows_GD / temperature
    loss_G = log_partition_G - similarity_G / temperature + proximal * difference_GD.square().sum(dim=1)
    terms = attended_GD.new_empty(len(attended_GD), dim + 2)
    terms[:, :dim] = attended_GD / temperature + torch.where(owned_G[:, None], gradient_GD, 0)
    terms[:, dim] = torch.where(owned_G, loss_G, 0)
    terms[:, dim + 1] = torch.where(owned_G, similarity_G, 0)
    return terms
