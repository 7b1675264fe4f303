"""Sampled softmax: InfoNCE over the bank, the positive against m sampled rows (van den Oord et al. 2018, Eq. 4).

    P(i|f) = exp(v_i·f/τ) / (exp(v_i·f/τ) + Σ_k exp(v_{j_k}·f/τ)),   J = -log P(i|f_i) + λ ‖f_i - v_i‖²

The m rows are drawn uniformly, separately for every query or once for the whole batch. A drawn row that is the positive
itself takes no part as a negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cluster.exchange import to_device
from instdisc.common.errors import ConfigError
from instdisc.model.bank import Bank
from instdisc.objectives.attention import attend
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective, weighted_rows
from instdisc.objectives.softmax import softmax_terms
from instdisc.settings.objectives import InfoNCEConfig

# Rows gathered at a time: few enough to stay in the cache between the two products that read them.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


class InfoNCE(Objective):
    """The objective; it has no state.

    Args:
        config: Settings.
        num_instances: n, rows of the whole bank.
        bank: This rank's rows.
    """

    def __init__(self, config: InfoNCEConfig, num_instances: int, bank: Bank) -> None:
        self.config: InfoNCEConfig = config
        self.num_instances = num_instances
        # A shard's share of the m negatives is drawn as a whole number, and each draw counts by the ratio.
        self.due = config.num_negatives * len(bank.rows) / num_instances
        self.count = max(1, round(self.due))

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """Gradient, loss and similarity to the positive; see `Objective.shard_terms`."""
        negatives, weight = self.draw(queries, bank, generator)
        attend_sampled = self._attend_shared if self.config.shared_negatives else self._attend_own
        attended_GD, log_sum_G = attend_sampled(queries, bank, negatives)
        log_sum_G += math.log(weight)
        positions_G, owned_G = bank.local(queries.instance_ids_G)
        rows_GD = bank.rows[positions_G].float()
        scores_G = (queries.embeddings_GD.float() * rows_GD).sum(dim=1) / self.config.temperature
        scores_G = scores_G.masked_fill(~owned_G, -torch.inf)
        log_partition_G = merge_log_sums(torch.logaddexp(log_sum_G, scores_G))
        log_partition_G = torch.where(queries.instance_ids_G >= 0, log_partition_G, 0)
        attended_GD = attended_GD * torch.exp(log_sum_G - log_partition_G)[:, None]
        attended_GD += rows_GD * torch.exp(scores_G - log_partition_G)[:, None]
        return softmax_terms(queries, bank, attended_GD, log_partition_G, self.config)

    def draw(self, queries: BatchQueries, bank: Bank, generator: torch.Generator) -> tuple[Tensor, float]:
        """Draw this shard's share of the negatives.

        Shared ones represent all rows of images outside the batch; this shard draws in proportion to its own.

        Returns:
            Positions in this shard, int64 (K,) if they are shared, else int64 (G, K); and how often each draw counts.
            Empty where all rows of the shard belong to images of the batch.

        Raises:
            ConfigError: Shared negatives, and no image outside of the batch. Raised on all ranks.
        """
        rows, device, ids_G = len(bank.rows), bank.rows.device, queries.instance_ids_G
        if not self.config.shared_negatives:
            shape = (len(ids_G), self.count)
            return torch.randint(rows, shape, generator=generator, device=device), self.due / self.count
        # On the CPU, as sizes follow from what is found.
        batch_ids = queries.batch_ids_WB[queries.batch_ids_WB >= 0].unique()  # type: ignore[no-untyped-call]
        others = self.num_instances - len(batch_ids)
        if others == 0:
            raise ConfigError(
                f"the batch holds all {self.num_instances} images, which leaves no negatives: lower "
                "--training.batch-size, or draw negatives for each image with --objective.no-shared-negatives"
            )
        taken_T = batch_ids[(batch_ids >= bank.start) & (batch_ids < bank.stop)] - bank.start
        left = rows - len(taken_T)
        if left == 0:
            return to_device(taken_T[:0], device), 1.0
        negatives_K = torch.randint(left, (self.count,), generator=generator, device=device)
        # Number k among the rows that are left comes after so many that are taken.
        left_before_T = to_device(taken_T - torch.arange(len(taken_T)), device)
        negatives_K += torch.searchsorted(left_before_T, negatives_K, right=True)
        return negatives_K, self.config.num_negatives * left / others / self.count

    def _attend_shared(self, queries: BatchQueries, bank: Bank, negatives_K: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the sampled rows under their softmax, float32 (G, D), and log of its denominator (G,)."""
        if not len(negatives_K):
            zero_GD = torch.zeros_like(queries.embeddings_GD, dtype=torch.float32)
            return zero_GD, zero_GD[:, 0] - torch.inf
        rows_KD = bank.rows.index_select(0, negatives_K)
        return attend(queries.embeddings_GD, rows_KD, self.config.temperature)

    def _attend_own(self, queries: BatchQueries, bank: Bank, negatives_GK: Tensor) -> tuple[Tensor, Tensor]:
        """The same where every query has negatives of its own, a block of queries at a time."""
        (num_queries, dim), rows_SD = queries.embeddings_GD.shape, bank.rows
        positions_G, owned_G = bank.local(queries.instance_ids_G)
        positive_G = torch.where(owned_G, positions_G, -1)
        attended_GD = rows_SD.new_empty(num_queries, dim, dtype=torch.float32)
        log_sum_G = rows_SD.new_empty(num_queries, dtype=torch.float32)
        row_bytes = self.count * dim * rows_SD.element_size()
        block = max(1, _BLOCK_BYTES[rows_SD.device.type] // row_bytes)
        for first in range(0, num_queries, block):
            chosen = slice(first, first + block)
            negatives_bK = negatives_GK[chosen]
            rows_bKD = rows_SD.index_select(0, negatives_bK.flatten()).view(*negatives_bK.shape, dim)
            scores_bK = torch.bmm(rows_bKD, queries.embeddings_GD[chosen, :, None])[..., 0].float()
            scores_bK = scores_bK.div_(self.config.temperature)
            scores_bK.masked_fill_(negatives_bK == positive_G[chosen, None], -torch.inf)
            log_sum_b = torch.logsumexp(scores_bK, dim=1)
            # A query all of whose negatives are its positive has no weights.
            weights_bK = torch.nan_to_num(torch.exp(scores_bK - log_sum_b[:, None]), nan=0.0)
            attended_GD[chosen] = weighted_rows(weights_bK, rows_bKD)
            log_sum_G[chosen] = log_sum_b
        return attended_GD, log_sum_G
