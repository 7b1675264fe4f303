"""One step of an objective as the trainer does it, on a batch that is the same whatever the number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.base import Objective, Result, build_objective
from instdisc.objectives.loss import loss_and_gradient
from instdisc.settings.objectives import ObjectiveConfig

GLOBAL_BATCH = 6
KINDS = ("random", "all equal", "duplicates", "opposite")


class Step(NamedTuple):
    """What one rank had and got."""

    result: Result
    objective: Objective
    bank: Bank


def rows_like(kind: str, num_instances: int, dim: int) -> Tensor:
    """Unit rows float32 (n, D): random, or such that bring a careless formula down."""
    rows = random_unit_rows(0, num_instances, dim, seed=7)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "duplicates":
        rows[1::2] = rows[: 2 * (num_instances // 2) : 2]
    elif kind == "opposite":
        rows = F.normalize(rows[:1] + 1e-3 * rows, dim=1)
    return rows


def batch(kind: str, num_instances: int, dim: int, views: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings float32 (V, B, D), unit, and ids int64 (B,), distinct if the rows suffice; the third has no image."""
    embeddings = random_unit_rows(100, 100 + views * GLOBAL_BATCH, dim, seed=3)
    if kind == "opposite":
        embeddings = -rows_like(kind, num_instances, dim)[:1].repeat(views * GLOBAL_BATCH, 1)
    elif kind == "all equal":
        embeddings[:] = embeddings[0].clone()
    ids = torch.randperm(num_instances, generator=torch.Generator().manual_seed(0)).repeat(GLOBAL_BATCH)
    ids = ids[:GLOBAL_BATCH].clone()
    ids[2] = -1
    return embeddings.view(views, GLOBAL_BATCH, dim), ids


def step(
    rank: int,
    world_size: int,
    config: ObjectiveConfig,
    kind: str,
    num_instances: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype = torch.float32,
) -> Step:
    """One step without the updates that follow it, with a bank of the given dtype; all vectors are rounded first."""
    exchange, partition = Exchange(rank, world_size), Partition(num_instances, world_size)
    rows = rows_like(kind, num_instances, dim).to(rounded_to).to(dtype)
    bank = Bank(rows[partition.start(rank) : partition.stop(rank)].clone(), partition.start(rank))
    objective = build_objective(config, num_instances, bank)
    embeddings, ids = batch(kind, num_instances, dim, config.views)
    embeddings = embeddings.to(rounded_to).float()
    mine = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    result, _ = loss_and_gradient(
        objective,
        bank,
        exchange,
        embeddings[:, mine].flatten(0, 1),
        ids.view(world_size, -1),
        torch.Generator().manual_seed(100 + rank),
    )
    return Step(result, objective, bank)


def whole_batch(steps: list[Step], views: int = 1) -> tuple[Tensor, Tensor]:
    """Loss (V, B) and gradient (V, B, D) of the global batch from the ranks' parts."""
    losses = [each.result.loss_Q.view(views, -1) for each in steps]
    gradients = [each.result.gradient_QD.view(views, -1, each.result.gradient_QD.shape[1]) for each in steps]
    return torch.cat(losses, dim=1), torch.cat(gradients, dim=1)
