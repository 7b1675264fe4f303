"""What the trainer asks of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from instdisc.bank import Bank

MergeLogSums = Callable[[Tensor], Tensor]
"""From every rank's logarithms of sums, float32 (G,), to the logarithm of the sum over all ranks, the same on all."""


class Result(NamedTuple):
    """Loss and gradient of this rank's images.

    Attributes:
        loss_B: float32 (B,), 0 where there is no image.
        gradient_BD: float32 (B, D), of each image's own loss with respect to its embedding.
        sums: Scalars, float64, summed over this rank's images. The trainer adds them over the ranks, divides by the
            number of images, logs them, and gives them back to `Objective.observe`.
    """

    loss_B: Tensor
    gradient_BD: Tensor
    sums: dict[str, Tensor]


def check_temperature(temperature: float) -> None:
    """Refuse a τ that exponentials of `similarity/τ` cannot bear.

    Raises:
        ValueError: τ is below 0.005 or not a number.
    """
    if not 0.005 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, it must be at least 0.005: 0.07 to 0.2 are usual")


class Objective(Protocol):
    """Loss and gradient in two local steps; the trainer carries the partial results between them.

    First every rank, as the owner of a shard of the bank, works out what its rows contribute to the queries of all
    ranks; then every rank, as the asker, merges what the owners sent for its own queries. No method communicates.
    """

    def shard_terms(
        self,
        queries_GD: Tensor,
        instance_ids_G: Tensor,
        bank: Bank,
        generator: torch.Generator,
        merge_log_sums: MergeLogSums,
    ) -> Tensor:
        """The owner's part for the queries of all ranks.

        Args:
            queries_GD: (G, D), unit rows, dtype of the bank.
            instance_ids_G: int64 (G,), the positives; -1 for a query without an image.
            bank: This rank's rows.
            generator: For what the objective draws, on the device of the bank; seeded differently on every rank.
            merge_log_sums: How the owners agree on a sum over all rows; every rank calls it equally often.

        Returns:
            float32 (G, C); what the C columns are is the objective's own affair.
        """
        ...

    def merge(self, terms_WBC: Tensor, instance_ids_B: Tensor) -> Result:
        """Loss and gradient of this rank's queries from the parts (W, B, C) of all owners."""
        ...

    def observe(self, means: Mapping[str, float]) -> None:
        """Take note of the step's means over the global batch, the same numbers on every rank."""
        ...

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        ...
