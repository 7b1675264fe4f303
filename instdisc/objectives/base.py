"""What the trainer asks of an objective."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instdisc.model.bank import Bank
from instdisc.settings.objectives import ObjectiveConfig

MergeLogSums = Callable[[Tensor], Tensor]
"""From every rank's logarithms of sums, floating point (…, G), to the logarithms of the sums over all ranks, the same
on all of them."""


class BatchQueries(NamedTuple):
    """The embeddings of all ranks: rank by rank, and of every rank its first views, then its second views.

    Attributes:
        embeddings_GD: (G, D), unit rows, dtype of the bank; G = W·V·B.
        instance_ids_G: int64 (G,), the positives; -1 for a query without an image.
        views: V, embeddings of each image.
        local: Which of them are this rank's own.
        batch_ids_WB: Instance ids of the images of all ranks, int64 (W, B), -1 for none; on the CPU whatever the
            device, so that what follows from them is worked out without waiting for a GPU.
    """

    embeddings_GD: Tensor
    instance_ids_G: Tensor
    views: int
    local: slice
    batch_ids_WB: Tensor


class Result(NamedTuple):
    """Loss and gradient of this rank's embeddings, Q = V·B of them.

    Attributes:
        loss_Q: float32 (Q,), 0 where there is no image.
        gradient_QD: float32 (Q, D), of the sum of the losses of all ranks with respect to each embedding.
        sums: Scalars, float64, summed over this rank's embeddings. The trainer adds them over the ranks, divides by
            the number of embeddings, logs them, and gives them back to `Objective.observe`.
    """

    loss_Q: Tensor
    gradient_QD: Tensor
    sums: dict[str, Tensor]


class Objective(ABC):
    """Loss and gradient in two local steps; the trainer carries the partial results between them.

    First every rank, as the owner of rows, works out what its rows contribute to the queries of all ranks; then every
    rank, as the asker, merges what the owners sent for its own queries. No method communicates.

    An objective is built from its settings, n, and this rank's shard of the bank, of which it takes sizes, dtype and
    device. What its settings alone tell, such as the number of views, is said by them: see `ObjectiveConfig`.

    Attributes:
        config: Its settings.
    """

    config: ObjectiveConfig

    @abstractmethod
    def __init__(self, config: Any, num_instances: int, bank: Bank) -> None:
        """Make the objective from its settings, n and this rank's rows."""

    @abstractmethod
    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """The owner's part for the queries of all ranks.

        Args:
            queries: Of all ranks.
            bank: This rank's rows.
            generator: For what the objective draws, on the device of the bank; seeded differently on every rank.
            merge_log_sums: How the owners agree on a sum over all rows; every rank calls it equally often.

        Returns:
            float32 (G, C). Unless `merge` says otherwise the columns are gradient (D), loss, and similarity to the
            positive, each of which is to be summed over the owners.
        """

    def merge(self, terms_WQC: Tensor, instance_ids_Q: Tensor) -> Result:
        """Loss and gradient of this rank's queries from the parts (W, Q, C) of all owners.

        `sums` holds `loss` and `positive_similarity`.
        """
        summed_QC = torch.where((instance_ids_Q >= 0)[:, None], terms_WQC.sum(dim=0), 0)
        gradient_QD, loss_Q, similarity_Q = summed_QC[:, :-2], summed_QC[:, -2], summed_QC[:, -1]
        sums = {"loss": loss_Q.double().sum(), "positive_similarity": similarity_Q.double().sum()}
        return Result(loss_Q, gradient_QD, sums)

    def observe(self, means: Mapping[str, Tensor], sound: Tensor) -> None:
        """Take note of the step's means over all embeddings, the same numbers on every rank.

        Args:
            means: Scalars on the device, float64.
            sound: bool, a scalar on the device; where it is false nothing may change. The host does not know it yet.
        """

    def update(self, learning_rate: float, num_queries: int, sound: Tensor) -> None:
        """Train what the objective itself learns, on the parts since the last call.

        Args:
            learning_rate: The rate of this step.
            num_queries: Queries of all ranks and parts; the loss is their mean.
            sound: bool, a scalar on the device; where it is false nothing but what was gathered for this may change.
        """

    def tables(self) -> dict[str, Tensor]:
        """State that is partitioned as the bank is, (S, …) by name, to be saved and restored in place."""
        return {}

    def numbers(self) -> dict[str, Tensor]:
        """State that is the same on every rank, scalars by name, on the device of the bank, changed in place.

        They are saved and restored, written to the journal after every step, and exported to Prometheus where
        `instdisc.common.metrics.TRAINING` has a gauge of that name.
        """
        return {}

    def state_dict(self) -> dict[str, float]:
        """`numbers` on the host, which waits for them."""
        return {name: float(value) for name, value in self.numbers().items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a saved state."""
        for name, value in self.numbers().items():
            value.fill_(state[name])


def build_objective(config: ObjectiveConfig, num_instances: int, bank: Bank) -> Objective:
    """The objective that the settings name, for this rank's rows of n."""
    objective: Objective = pkgutil.resolve_name(config.implementation)(config, num_instances, bank)
    return objective


def weighted_rows(weights_GK: Tensor, rows_GKD: Tensor) -> Tensor:
    """Sum rows by their weights, whatever the range of the weights, in a product of the rows' dtype.

    Half precision holds numbers from 6e-8 to 65,504: before the product a query's largest weight becomes 1, or less
    where so many rows could add up to more.

    Args:
        weights_GK: float32 (G, K), 0 or above.
        rows_GKD: (G, K, D) or, the same rows for all queries, (K, D); float32, float16 or bfloat16, from -1 to 1.

    Returns:
        `Σ_k weights_gk rows_gk`, float32 (G, D).
    """
    tiny = torch.finfo(torch.float32).tiny
    unit_G1 = weights_GK.amax(dim=1, keepdim=True).clamp_min(tiny) * max(1, weights_GK.shape[1] / 2**15)
    summed_G1D = torch.matmul((weights_GK / unit_G1)[:, None].to(rows_GKD.dtype), rows_GKD)
    return summed_G1D[:, 0].float() * unit_G1
