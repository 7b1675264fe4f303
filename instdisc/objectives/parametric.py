"""The parametric softmax: a trained weight vector per instance (Wu et al. 2018, Eq. 1; Dosovitskiy et al. 2014).

    P(i|f) = exp(w_i·f/τ) / Σ_j exp(w_j·f/τ),   J = -log P(i|f_i)

The papers' equation has no τ; f is a unit vector here, and w of any length.

The weights are partitioned as the bank is, and trained where they live: every owner gets the queries of all ranks
anyway, and from them and the denominators the gradient of its own rows. The bank still follows the embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instdisc.model.bank import Bank
from instdisc.model.sgd import SkippingSGD
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective
from instdisc.settings.objectives import ParametricSoftmaxConfig

# On a CPU the scores of a block stay in the cache; on a GPU launches are few.
_BLOCK_ROWS = {"cpu": 4096, "cuda": 65536}


class ParametricSoftmax(Objective):
    """The objective with this rank's weights, their gradient and momentum: three times the memory of the bank.

    Args:
        config: Settings.
        num_instances: n.
        bank: This rank's rows; the weights start as a copy of them.
    """

    def __init__(self, config: ParametricSoftmaxConfig, num_instances: int, bank: Bank) -> None:
        self.config: ParametricSoftmaxConfig = config
        self.weights = Bank(bank.rows.float().clone(), bank.start)
        self._gradient_SD = torch.zeros_like(self.weights.rows)
        self._momentum_SD = torch.zeros_like(self.weights.rows)
        self._optimizer = SkippingSGD(
            [{"params": [self.weights.rows]}],
            learning_rate=0.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._optimizer.state[self.weights.rows]["momentum_buffer"] = self._momentum_SD

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """Gradient, loss and similarity to the positive; adds up the gradient of the weights for `update`."""
        temperature, weights_SD = self.config.temperature, self.weights.rows
        queries_GD, present_G = queries.embeddings_GD.float(), queries.instance_ids_G >= 0
        scaled_DG = queries_GD.T / temperature
        block = _BLOCK_ROWS[weights_SD.device.type]
        blocks = range(0, len(weights_SD), block)
        log_sums_G = [torch.logsumexp(weights_SD[b : b + block] @ scaled_DG, dim=0) for b in blocks]
        log_partition_G = merge_log_sums(torch.logsumexp(torch.stack(log_sums_G), dim=0))
        terms = queries_GD.new_zeros(len(queries_GD), queries_GD.shape[1] + 2)
        gradient_GD = terms[:, :-2]
        for first in blocks:
            chosen = slice(first, first + block)
            probabilities_bG = torch.exp(weights_SD[chosen] @ scaled_DG - log_partition_G)
            probabilities_bG *= present_G / temperature
            gradient_GD.addmm_(probabilities_bG.T, weights_SD[chosen])
            self._gradient_SD[chosen].addmm_(probabilities_bG, queries_GD)
        positions_G, owned_G = self.weights.local(queries.instance_ids_G)
        rows_GD = weights_SD[positions_G]
        scores_G = (queries_GD * rows_GD).sum(dim=1)
        gradient_GD -= torch.where(owned_G[:, None], rows_GD / temperature, 0)
        self._gradient_SD.index_add_(
            0, positions_G, torch.where(owned_G[:, None], queries_GD / -temperature, 0)
        )
        terms[:, -2] = torch.where(owned_G, log_partition_G - scores_G / temperature, 0)
        terms[:, -1] = torch.where(owned_G, scores_G, 0)
        return terms

    def update(self, learning_rate: float, num_queries: int, sound: Tensor) -> None:
        """One step of SGD with momentum on this rank's weights."""
        self.weights.rows.grad = self._gradient_SD
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step_if(sound, num_queries)
        self._gradient_SD.zero_()

    def tables(self) -> dict[str, Tensor]:
        """`weights` and `weights_momentum`, float32 (S, D)."""
        return {"weights": self.weights.rows, "weights_momentum": self._momentum_SD}
