"""What a run costs a rank in memory, bytes and time, by arithmetic: sizes are exact, times follow from given rates."""

from __future__ import annotations

import math
from typing import NamedTuple

from cluster.partition import Partition
from instdisc.settings.model import BackboneConfig
from instdisc.settings.plan import PlanConfig

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT32_BYTES = 4
_ID_BYTES = 8
_PASSES = 3
"""A backward pass computes twice what the forward pass does."""


class Cost(NamedTuple):
    """The cost of one rank.

    Attributes:
        memory_bytes: Of the largest shard: the bank, and tables that the objective keeps beside it.
        sent_bytes: Bytes sent per step, DDP's gradients apart.
        exchange_seconds: Time for them.
        objective_seconds: Time per step for loss and gradient.
    """

    memory_bytes: int
    sent_bytes: int
    exchange_seconds: float
    objective_seconds: float


class NetworkSize(NamedTuple):
    """Size of a network.

    Attributes:
        operations: Floating-point operations of one image's forward pass.
        parameters: Numbers that are trained.
    """

    operations: int
    parameters: int


class RunCost(NamedTuple):
    """What a step and a run cost with a network.

    Attributes:
        network_seconds: Time per step of forward and backward passes.
        gradient_seconds: Time per step for the sum of the gradients over the ranks.
        step_seconds: Of a whole step.
        snapshot_bytes: Of all ranks together.
        pause_seconds: That training waits for a snapshot, which is written in the background.
        write_seconds: That it takes to write.
        every_steps: Steps between two snapshots with which the least time is lost.
        lost: Fraction of the time lost to snapshots, failures and the steps done again after them.
    """

    network_seconds: float
    gradient_seconds: float
    step_seconds: float
    snapshot_bytes: int
    pause_seconds: float
    write_seconds: float
    every_steps: int
    lost: float


def cost(config: PlanConfig, num_instances: int, world_size: int) -> Cost:
    """The cost of a rank of `world_size` with a bank of `num_instances` rows.

    Raises:
        ValueError: Bank or batch cannot be cut over so many ranks.
    """
    if config.batch_size % world_size:
        raise ValueError(f"a batch of {config.batch_size:,} images cannot be shared by {world_size} ranks")
    partition = Partition(num_instances, world_size)
    shard = max(partition.stop(rank) - partition.start(rank) for rank in range(world_size))
    objective, dim = config.objective, config.embedding_dim
    row_bytes = dim * _ELEMENT_BYTES[config.dtype]
    sent = sent_bytes(config, world_size)
    # Queries, sums that the owners agree on, terms, ids and rows.
    collectives = 0 if world_size == 1 else 4 + len(objective.agreed_bytes)
    step = objective.step_cost(config.batch_size * objective.views, shard, shard / num_instances, dim)
    return Cost(
        memory_bytes=shard * (row_bytes + objective.tables_beside_bank * dim * _FLOAT32_BYTES),
        sent_bytes=sent,
        exchange_seconds=sent / config.link_bytes_per_second + collectives * config.collective_seconds,
        objective_seconds=step.operations / config.flops_per_second
        + step.gathered_rows * row_bytes / config.gather_bytes_per_second,
    )


def sent_bytes(config: PlanConfig, world_size: int) -> int:
    """Bytes that a rank sends per step on average: see `cluster.exchange`.

    The ids of the batch to all hosts, queries with their ids to all owners, gradient and a few numbers per query back,
    each new embedding to its owner, and the sums that the owners agree on to all. Nothing depends on the number of rows
    or negatives.
    """
    dim, others = config.embedding_dim, world_size - 1
    local_batch = config.batch_size / world_size
    local_queries = local_batch * config.objective.views
    queries = local_queries * (dim * _ELEMENT_BYTES[config.dtype] + _ID_BYTES) * others
    terms = local_queries * (dim + 3) * _FLOAT32_BYTES * others
    rows = local_batch * dim * _FLOAT32_BYTES * others / world_size
    sums = config.batch_size * config.objective.views * sum(config.objective.agreed_bytes) * others
    announced = (local_batch + 1) * _ID_BYTES * others
    return round(queries + terms + rows + sums + announced)


def network_size(backbone: BackboneConfig, image_size: int) -> NetworkSize:
    """Count a network's operations on tensors without memory, and its parameters.

    Raises:
        ConfigError: The network is unknown.
    """
    # Here, so that a plan without a network is made without PyTorch.
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from instdisc.model.backbone import build_embedder

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        embedder = build_embedder(backbone, image_size).eval()
        embedder(torch.empty(1, 3, image_size, image_size))
    return NetworkSize(counter.get_total_flops(), sum(each.numel() for each in embedder.parameters()))


def run_cost(config: PlanConfig, network: NetworkSize, num_instances: int, world_size: int) -> RunCost:
    """The cost of a step and of a run that saves snapshots and loses ranks.

    Nothing is assumed to overlap within a step. The state that a snapshot copies is a rank's shard; it is written while
    training continues, so that training waits for the copy alone, and a loss costs, on average, half the steps between
    two snapshots, the time to write one, and a restart. The steps between two are those of Young 1974,
    √(2 · pause · mean time between failures), but no snapshot begins before the one before it is written.

    Raises:
        ValueError: Bank or batch cannot be cut over so many ranks.
    """
    rank = cost(config, num_instances, world_size)
    images = config.batch_size // world_size * config.objective.views
    network_seconds = _PASSES * network.operations * images / config.network_flops_per_second
    weights = network.parameters * _FLOAT32_BYTES
    # A ring sends all but a rank's own part twice: to be summed, and the sums.
    summed = 2 * weights * (world_size - 1) / world_size
    gradient_seconds = summed / config.link_bytes_per_second
    step = network_seconds + gradient_seconds + rank.exchange_seconds + rank.objective_seconds
    row_bytes = _ELEMENT_BYTES[config.dtype] + config.objective.tables_beside_bank * _FLOAT32_BYTES
    snapshot = num_instances * config.embedding_dim * row_bytes + 2 * weights  # and their momentum
    pause = (rank.memory_bytes + 2 * weights) / config.host_copy_bytes_per_second
    write = snapshot / config.storage_bytes_per_second
    failure = config.rank_mtbf_hours * 3600 / world_size
    every = max(1, round(math.sqrt(2 * pause * failure) / step), math.ceil(write / step))
    return RunCost(
        network_seconds=network_seconds,
        gradient_seconds=gradient_seconds,
        step_seconds=step,
        snapshot_bytes=snapshot,
        pause_seconds=pause,
        write_seconds=write,
        every_steps=every,
        lost=lost(every * step, pause, write, config.restart_seconds, failure),
    )


def lost(interval: float, pause: float, write: float, restart: float, failure: float) -> float:
    """Fraction of the time that is lost, all in seconds: a pause every interval, and what each failure costs."""
    return pause / interval + (interval / 2 + write + restart) / failure
