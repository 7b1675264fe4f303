"""Noise-contrastive estimation over the memory bank (Wu et al. 2018, section 3.2).

With `P(i|f) = exp(v_i·f/τ)/Z`, uniform noise `1/n` and m negatives for each positive,
`h(i, f) = P(i|f) / (P(i|f) + m/n)` is the probability that i came from the data, and the loss of one query is

    J = -log h(i, f_i) - Σ_k log(1 - h(j_k, f_i)) + λ ‖f_i - v_i‖².

As Z is a constant, h is the logistic function of `s/τ - log Z + log(n/m)`, s the cosine similarity; every term stands
alone, and the owner of a row works out its share of loss and gradient without asking anyone.
"""

from __future__ import annotations

import functools
import logging
import math
import subprocess
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective, Result, weighted_rows
from instdisc.settings.objectives import NCEConfig

logger = logging.getLogger(__name__)

# Rows gathered at a time: few enough to stay in the cache between the two products that read them.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
# Up to so many rows in the shard for each negative, two products with all rows take less time than gathering.
_DENSE_ROWS_PER_NEGATIVE = 4


class NCE(Objective):
    """The objective and its only state, log Z, which is the same on every rank and lives on the device of the bank.

    Until a batch has been seen, log Z is what random unit rows give: similarities are then normal with variance 1/D,
    and `E exp(s/τ) = exp(1 / (2 D τ²))`, but at most `exp(1/τ)`.

    Args:
        config: Settings.
        num_instances: n, rows of the whole bank.
        bank: This rank's rows.
    """

    def __init__(self, config: NCEConfig, num_instances: int, bank: Bank) -> None:
        self.config: NCEConfig = config
        self.num_instances = num_instances
        exponent = 1 / (2 * bank.rows.shape[1] * config.temperature**2)
        first = math.log(num_instances) + min(exponent, 1 / config.temperature)
        device = bank.rows.device
        self.log_partition = torch.tensor(first, dtype=torch.float64, device=device)
        self.batches_seen = torch.zeros((), dtype=torch.float64, device=device)

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """This owner's share of loss and gradient; see `Objective.shard_terms`. The owners need no agreement.

        Returns:
            float32 (G, D + 3): gradient; loss; similarity to the positive, 0 where another rank owns it; log of this
            shard's share of `Σ_k exp(s_k/τ)`.
        """
        negatives_GK, weight = self.draw(len(queries.embeddings_GD), bank, generator)
        terms = self.negative_terms(queries.embeddings_GD, negatives_GK, weight, bank.rows)
        self._add_positives(terms, queries, bank)
        return terms

    def draw(self, num_queries: int, bank: Bank, generator: torch.Generator) -> tuple[Tensor, float]:
        """Draw this shard's share of every query's negatives.

        A shard of n_w of the n rows is due `m·n_w/n` of the m negatives. It draws the nearest whole number, and each
        draw counts by the ratio, so that the sum over all shards stays unbiased for m uniform draws from n rows.

        Returns:
            Positions in this shard, int64 (G, K), and the weight of each draw.
        """
        rows = len(bank.rows)
        due = self.config.num_negatives * rows / self.num_instances
        count = max(1, round(due))
        negatives_GK = torch.randint(rows, (num_queries, count), generator=generator, device=bank.rows.device)
        return negatives_GK, due / count

    def negative_terms(
        self, queries_GD: Tensor, negatives_GK: Tensor, weight: float, rows_SD: Tensor
    ) -> Tensor:
        """The negatives' part of `shard_terms`, a block of queries at a time; nothing of size G·K·D ever exists.

        A block's rows are gathered once and serve both products. Where the shard is hardly larger than the sample,
        products with the whole shard are cheaper, and the sample is picked from their result. On a GPU a kernel that
        reads every sampled row once takes the place of both.

        Args:
            queries_GD: (G, D), dtype of the rows.
            negatives_GK: int64 (G, K), positions in this shard.
            weight: How often each draw counts.
            rows_SD: (S, D), this shard.
        """
        if rows_SD.is_cuda and (kernel := gpu_kernel()) is not None:
            return kernel(
                queries_GD,
                negatives_GK,
                rows_SD,
                weight=weight,
                temperature=self.config.temperature,
                logit_offset=self._logit_offset,
            )
        (num_queries, dim), (num_rows, num_negatives) = (
            queries_GD.shape,
            (len(rows_SD), negatives_GK.shape[1]),
        )
        dense = num_rows <= _DENSE_ROWS_PER_NEGATIVE * num_negatives
        query_entries = num_rows if dense else num_negatives * dim
        block = max(1, _BLOCK_BYTES[rows_SD.device.type] // (query_entries * rows_SD.element_size()))
        gathered = rows_SD.new_empty(0 if dense else min(block, num_queries) * num_negatives, dim)
        terms = queries_GD.new_empty(num_queries, dim + 3, dtype=torch.float32)
        for first in range(0, num_queries, block):
            queries_bD = queries_GD[first : first + block]
            negatives_bK = negatives_GK[first : first + block]
            if dense:
                scores_bK = (queries_bD @ rows_SD.T).gather(1, negatives_bK)
            else:
                rows_bKD = gathered[: negatives_bK.numel()]
                torch.index_select(rows_SD, 0, negatives_bK.flatten(), out=rows_bKD)
                rows_bKD = rows_bKD.view(*negatives_bK.shape, dim)
                scores_bK = torch.bmm(rows_bKD, queries_bD[:, :, None])[..., 0]
            scaled_bK = scores_bK.float() / self.config.temperature
            logits_bK = scaled_bK + self._logit_offset
            coefficients_bK = (weight / self.config.temperature) * torch.sigmoid(logits_bK)
            out = terms[first : first + block]
            if dense:
                coefficients_bS = coefficients_bK.new_zeros(len(out), num_rows)
                coefficients_bS.scatter_add_(1, negatives_bK, coefficients_bK)
                out[:, :dim] = weighted_rows(coefficients_bS, rows_SD)
            else:
                out[:, :dim] = weighted_rows(coefficients_bK, rows_bKD)
            out[:, dim] = weight * F.softplus(logits_bK).sum(dim=1)
            out[:, dim + 1] = 0
            out[:, dim + 2] = torch.logsumexp(scaled_bK, dim=1) + math.log(weight)
        return terms

    def _add_positives(self, terms: Tensor, queries: BatchQueries, bank: Bank) -> None:
        """Add the terms of the positives that this shard owns; without masked indexing, which waits for a GPU."""
        queries_GD, dim = queries.embeddings_GD.float(), queries.embeddings_GD.shape[1]
        temperature, proximal = self.config.temperature, self.config.proximal_weight
        positions_G, owned_G = bank.local(queries.instance_ids_G)
        rows_GD = bank.rows[positions_G].float()
        similarity_G = (queries_GD * rows_GD).sum(dim=1)
        logits_G = similarity_G / temperature + self._logit_offset
        difference_GD = queries_GD - rows_GD
        gradient_GD = (
            2 * proximal * difference_GD - (torch.sigmoid(-logits_G) / temperature)[:, None] * rows_GD
        )
        loss_G = F.softplus(-logits_G) + proximal * difference_GD.square().sum(dim=1)
        terms[:, :dim] += torch.where(owned_G[:, None], gradient_GD, 0)
        terms[:, dim] += torch.where(owned_G, loss_G, 0)
        terms[:, dim + 1] += torch.where(owned_G, similarity_G, 0)

    def merge(self, terms_WQC: Tensor, instance_ids_Q: Tensor) -> Result:
        """Loss and gradient of this rank's queries; see `Objective.merge`.

        `sums` holds `loss`, `positive_similarity` and `partition_ratio`, the estimate `n/m · Σ_k exp(s_k/τ)` of Z over
        the Z in use.
        """
        present_Q = instance_ids_Q >= 0
        summed_QC = torch.where(present_Q[:, None], terms_WQC[..., :-1].sum(dim=0), 0)
        log_sum_Q = torch.logsumexp(terms_WQC[..., -1].double(), dim=0)
        ratio_Q = torch.exp(log_sum_Q + self._logit_offset)
        gradient_QD, loss_Q, similarity_Q = summed_QC[:, :-2], summed_QC[:, -2], summed_QC[:, -1]
        return Result(
            loss_Q,
            gradient_QD,
            {
                "loss": loss_Q.double().sum(),
                "positive_similarity": similarity_Q.double().sum(),
                "partition_ratio": torch.where(present_Q, ratio_Q, 0).sum(),
            },
        )

    @torch.no_grad()
    def observe(self, means: Mapping[str, Tensor], sound: Tensor) -> None:
        """Update log Z from `partition_ratio`, the mean of the estimates over the Z that was in use."""
        config, seen = self.config, self.batches_seen + 1
        if config.log_partition_mode == "frozen":
            past_weight = (seen - 1) / seen
            follows = sound & (seen <= config.log_partition_batches)
        else:
            past_weight = config.log_partition_momentum * (seen > 1).double()
            follows = sound
        change = torch.log(past_weight + (1 - past_weight) * means["partition_ratio"])
        self.log_partition.add_(torch.where(follows, change, 0))
        self.batches_seen.add_(sound)

    def numbers(self) -> dict[str, Tensor]:
        """`log_partition` and `batches_seen`."""
        return {"log_partition": self.log_partition, "batches_seen": self.batches_seen}

    @property
    def _logit_offset(self) -> Tensor:
        """`log(n/m) - log Z`, which turns `s/τ` into the logit of h; float64, a scalar on the device."""
        return math.log(self.num_instances / self.config.num_negatives) - self.log_partition


@functools.cache
def gpu_kernel() -> Callable[..., Tensor] | None:
    """`nce_triton.negative_terms`; None, said once, where Triton is missing or cannot build what it needs."""
    try:
        from instdisc.objectives.nce_triton import build_driver, negative_terms

        build_driver()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "negatives are gathered by PyTorch, which is slower, as Triton does not work (%s): "
            "it needs the package triton, a C compiler and the header files of Python",
            error,
        )
        return None
    return negative_terms
