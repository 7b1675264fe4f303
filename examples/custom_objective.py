"""A new objective in a file of its own, trained on the bundled sample.

    python -m examples.custom_objective [--run-dir runs/decoupled] [OPTION of instdisc.train …]

Decoupled contrastive learning (Yeh et al. 2022, https://arxiv.org/abs/2110.06848) without its weights: with f_i and f̂_i
the embeddings of two views of image i, for each of the two,

    J = -f_i·f̂_i/τ + log Σ_k exp(f_i·f_k/τ),   k over both views of all other images of the batch.

Each rank owns its own embeddings as keys. The owners agree on one number per query, the logarithm of the sum.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from instdisc import train
from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective
from instdisc.settings.objectives import ObjectiveConfig
from instdisc.settings.recipes import RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class DecoupledConfig(ObjectiveConfig):
    """The two views of an image attract each other, all other images of the batch repel them."""

    name: ClassVar[str] = "decoupled"
    implementation: ClassVar[str] = "examples.custom_objective:Decoupled"
    views: ClassVar[int] = 2
    within_batch: ClassVar[bool] = True
    agreed_bytes: ClassVar[tuple[int, ...]] = (4,)  # per query: the logarithm of the sum, float32

    temperature: float = 0.1
    """τ, at least 0.005; 0.07 to 0.2 are usual."""


class Decoupled(Objective):
    """The objective; it has no state and leaves the bank to follow the embeddings.

    Args:
        config: Settings.
        num_instances: n.
        bank: This rank's rows.
    """

    def __init__(self, config: DecoupledConfig, num_instances: int, bank: Bank) -> None:
        self.config = config

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        """Gradient, loss and similarity to the positive; see `Objective.shard_terms`."""
        temperature, ids_G = self.config.temperature, queries.instance_ids_G
        queries_GD = queries.embeddings_GD.float()
        keys_QD, ids_Q = queries_GD[queries.local], ids_G[queries.local]
        number_G = torch.arange(len(ids_G), device=ids_G.device)
        present_GQ = (ids_G[:, None] >= 0) & (ids_Q >= 0)  # an image that cannot be decoded has the id -1
        same_image_GQ = present_GQ & (ids_G[:, None] == ids_Q)
        positive_GQ = same_image_GQ & (number_G[:, None] != number_G[queries.local])
        negative_GQ = present_GQ & ~same_image_GQ

        similarities_GQ = queries_GD @ keys_QD.T
        scores_GQ = (similarities_GQ / temperature).masked_fill(~negative_GQ, -torch.inf)
        log_sum_G = merge_log_sums(torch.logsumexp(scores_GQ, dim=1))
        log_sum_G = log_sum_G.masked_fill(log_sum_G == -torch.inf, 0)  # a query without negatives

        # The derivative of each query's loss with respect to each of its similarities.
        slope_GQ = (torch.exp(scores_GQ - log_sum_G[:, None]) - positive_GQ.float()) / temperature
        gradient_GD = slope_GQ @ keys_QD
        gradient_GD[queries.local] += slope_GQ.T @ queries_GD  # as keys
        similarity_G = torch.where(positive_GQ, similarities_GQ, 0).sum(dim=1)
        loss_G = -similarity_G / temperature
        loss_G[queries.local] += log_sum_G[queries.local]  # once, though all owners know it
        return torch.cat([gradient_GD, loss_G[:, None], similarity_G[:, None]], dim=1)


RECIPES["decoupled"] = Recipe(
    "The bundled sample, by decoupled contrastive learning.",
    replace(RECIPES["sample"].config, objective=DecoupledConfig()),
)


def main(options: Sequence[str]) -> int:
    # In this process: Ray's workers would not find what this file defines when it is run as a program.
    return train.main(["decoupled", *options, "--num-workers", "0"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
