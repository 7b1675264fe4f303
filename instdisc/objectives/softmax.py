"""The non-parametric softmax over every instance (Wu et al. 2018, Eq. 2), exact, whatever their number.

    P(i|f) = exp(v_i·f/τ) / Σ_j exp(v_j·f/τ),   J = -log P(i|f_i) + λ ‖f_i - v_i‖²

With unit rows its gradient is `(attention(f, V, V) - v_i) / τ` and its loss `logsumexp - v_i·f/τ`. A shard's attention
output counts by its share of the whole sum, so owners only need to agree on one number per query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from instdisc.bank import Bank
from instdisc.objectives.attention import attend
from instdisc.objectives.base import MergeLogSums, Result, check_temperature


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """The softmax over every instance."""

    temperature: float = 0.07
    """τ, at least 0.005. Smaller tells neighbours apart more sharply."""
    proximal_weight: float = 0.0
    """λ of the proximal term ‖f_i - v_i‖², 0 or above; v_i is the row before this step's update."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not self.proximal_weight >= 0:
            raise ValueError(f"proximal_weight is {self.proximal_weight}, it must be 0 or above")


class Softmax:
    """The objective; it has no state.

    Args:
        config: Settings.
        num_instances: n; every row takes part, whatever their number.
        embedding_dim: D.
    """

    def __init__(self, config: SoftmaxConfig, num_instances: int, embedding_dim: int) -> None:
        self.config = config

    def shard_terms(
        self,
        queries_GD: Tensor,
        instance_ids_G: Tensor,
        bank: Bank,
        generator: torch.Generator,
        merge_log_sums: MergeLogSums,
    ) -> Tensor:
        """This owner's share of loss and gradient; see `Objective.shard_terms`.

        Returns:
            float32 (G, D + 2): gradient, loss, similarity to the positive; the last two are 0 where another rank owns
            the positive.
        """
        dim, temperature, proximal = queries_GD.shape[1], self.config.temperature, self.config.proximal_weight
        attended_GD, log_sum_G = attend(queries_GD, bank.rows, temperature)
        log_partition_G = merge_log_sums(log_sum_G)
        share_G = torch.exp(log_sum_G - log_partition_G)
        terms = queries_GD.new_empty(len(queries_GD), dim + 2, dtype=torch.float32)
        terms[:, :dim] = attended_GD * (share_G / temperature)[:, None]
        positions_G, owned_G = bank.local(instance_ids_G)
        queries_GD, rows_GD = queries_GD.float(), bank.rows[positions_G].float()
        similarity_G, difference_GD = (queries_GD * rows_GD).sum(dim=1), queries_GD - rows_GD
        gradient_GD = 2 * proximal * difference_GD - rows_GD / temperature
        loss_G = log_partition_G - similarity_G / temperature + proximal * difference_GD.square().sum(dim=1)
        terms[:, :dim] += torch.where(owned_G[:, None], gradient_GD, 0)
        terms[:, dim] = torch.where(owned_G, loss_G, 0)
        terms[:, dim + 1] = torch.where(owned_G, similarity_G, 0)
        return terms

    def merge(self, terms_WBC: Tensor, instance_ids_B: Tensor) -> Result:
        """The sum over the owners; see `Objective.merge`. `sums` holds `loss` and `positive_similarity`."""
        summed_BC = torch.where((instance_ids_B >= 0)[:, None], terms_WBC.sum(dim=0), 0)
        gradient_BD, loss_B, similarity_B = summed_BC[:, :-2], summed_BC[:, -2], summed_BC[:, -1]
        sums = {"loss": loss_B.double().sum(), "positive_similarity": similarity_B.double().sum()}
        return Result(loss_B, gradient_BD, sums)

    def observe(self, means: Mapping[str, float]) -> None:
        """Nothing to take note of."""

    def state_dict(self) -> dict[str, float]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Nothing to go on from."""
