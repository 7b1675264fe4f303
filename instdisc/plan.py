"""What a run will need before machines are rented: `python -m instdisc.plan [--instances N …] [--world-size W …]`.

Memory and bytes follow from the sizes alone; times also from rates, which are stated and can be set.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from cluster.partition import Partition
from instdisc.objectives import NCE, InfoNCE, Objective, ParametricSoftmax, Softmax, Spreading

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT32_BYTES = 4
_ID_BYTES = 8
OBJECTIVES: dict[str, type[Objective]] = {
    "nce": NCE,
    "softmax": Softmax,
    "infonce": InfoNCE,
    "parametric": ParametricSoftmax,
    "spreading": Spreading,
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one rank and its link are.

    Attributes:
        source: Where the numbers come from.
        gather_bytes_per_second: Sampled rows of the bank, read and turned into loss and gradient.
        flops_per_second: Products of queries and rows, forward and gradient together.
        link_bytes_per_second: What a rank can send.
        collective_seconds: What a collective costs however little it carries.
    """

    source: str
    gather_bytes_per_second: float
    flops_per_second: float
    link_bytes_per_second: float
    collective_seconds: float


RATES = {
    "gpu": Rates(
        source="not measured: a data-centre GPU with half-precision rows and 200 Gbit/s",
        gather_bytes_per_second=0.9e12,
        flops_per_second=110e12,
        link_bytes_per_second=25e9,
        collective_seconds=30e-6,
    ),
    "cpu": Rates(
        source="two cores of an AMD EPYC, float32, measured 2026-11-22 (benchmarks/results); 10 Gbit/s assumed",
        gather_bytes_per_second=7.6e9,
        flops_per_second=154e9,
        link_bytes_per_second=1.25e9,
        collective_seconds=200e-6,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to plan for."""

    instances: tuple[int, ...] = (1_281_167, 10_000_000, 100_000_000, 1_000_000_000)
    """n, images of the data set; one or several."""
    world_size: tuple[int, ...] = (8, 32, 128, 512)
    """W, workers; one or several."""
    embedding_dim: int = 128
    """D, entries of an embedding."""
    batch_size: int = 4096
    """Images per step over all workers."""
    objective: Literal["nce", "softmax", "infonce", "parametric", "spreading"] = "nce"
    """nce and infonce compare with a sample of the rows, softmax with all of them, parametric with as many weights,
    spreading with the batch."""
    num_negatives: int | None = None
    """m of nce and infonce; 4,096 for nce and 65,536 for infonce by default."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Type of the bank's rows."""
    memory_gigabytes: float = 80.0
    """Memory of a rank, in 10^9 bytes; a bank that needs more than half of it is marked."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Which rates to take where none are given."""
    gather_bytes_per_second: float | None = None
    """Speed of nce on a rank: bytes of sampled rows per second; `benchmarks/objectives.py` measures it."""
    flops_per_second: float | None = None
    """Speed of the others on a rank: floating-point operations per second, four for every entry of every row and query;
    ten for parametric, whose weights are trained."""
    link_bytes_per_second: float | None = None
    """What a rank can send to others."""
    collective_seconds: float | None = None
    """What each of the collectives of a step costs at least."""

    def __post_init__(self) -> None:
        """Refuse sizes that nothing can have."""
        for name in ("embedding_dim", "batch_size", "num_negatives", "memory_gigabytes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be above 0")
        for name in ("gather_bytes_per_second", "flops_per_second", "link_bytes_per_second"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} is {rate}, it must be above 0")
        if self.num_negatives is not None and self.objective not in ("nce", "infonce"):
            raise ValueError(
                f"num_negatives is {self.num_negatives}, but {self.objective} draws none: leave it out"
            )
        if not all(number > 0 for number in self.instances + self.world_size):
            raise ValueError("instances and world_size must be 1 or more")

    @property
    def negatives(self) -> int:
        """The m that counts."""
        return self.num_negatives or (65_536 if self.objective == "infonce" else 4096)

    @property
    def views(self) -> int:
        """Queries for every image."""
        return OBJECTIVES[self.objective].views

    @property
    def rates(self) -> Rates:
        """The device's rates with those given in their place."""
        default = RATES[self.device]
        names = [field.name for field in dataclasses.fields(Rates) if field.name != "source"]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(default, **given)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one rank bears.

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


def cost(config: PlanConfig, num_instances: int, world_size: int) -> Cost:
    """What a rank of `world_size` bears with a bank of `num_instances` rows.

    Raises:
        ValueError: Bank or batch cannot be cut over so many ranks.
    """
    if config.batch_size % world_size:
        raise ValueError(f"a batch of {config.batch_size:,} images cannot be shared by {world_size} ranks")
    partition = Partition(num_instances, world_size)
    shard = max(partition.stop(rank) - partition.start(rank) for rank in range(world_size))
    dim, tables = config.embedding_dim, OBJECTIVES[config.objective].tables_beside_bank
    sent = sent_bytes(config, world_size)
    # Queries, sums that the owners agree on, terms, ids and rows.
    collectives = 0 if world_size == 1 else 4 + len(OBJECTIVES[config.objective].agreed_bytes)
    return Cost(
        memory_bytes=shard * dim * (_ELEMENT_BYTES[config.dtype] + tables * _FLOAT32_BYTES),
        sent_bytes=sent,
        exchange_seconds=sent / config.rates.link_bytes_per_second
        + collectives * config.rates.collective_seconds,
        objective_seconds=_objective_seconds(config, shard / num_instances, shard),
    )


def _objective_seconds(config: PlanConfig, share: float, shard: int) -> float:
    rates, queries = config.rates, config.batch_size * config.views
    row_bytes = config.embedding_dim * _ELEMENT_BYTES[config.dtype]
    # Every owner reads its share of the negatives, and one of them at least.
    drawn = max(1.0, config.negatives * share)
    if config.objective == "nce":  # of each query
        return queries * drawn * row_bytes / rates.gather_bytes_per_second
    rows = {"infonce": drawn, "spreading": queries * share}.get(config.objective, shard)
    operations = 10 if config.objective == "parametric" else 4
    seconds = operations * queries * rows * config.embedding_dim / rates.flops_per_second
    gathered = drawn * row_bytes if config.objective == "infonce" else 0
    return seconds + gathered / rates.gather_bytes_per_second


def sent_bytes(config: PlanConfig, world_size: int) -> int:
    """Bytes that a rank sends per step on average: see `cluster.exchange`.

    Queries with their ids to all owners, gradient and a few numbers per query back, each new embedding to its owner;
    but for nce, the logarithm of each owner's sum to all. Nothing depends on the number of rows or negatives.
    """
    dim, others = config.embedding_dim, world_size - 1
    local_batch = config.batch_size / world_size
    local_queries = local_batch * config.views
    queries = local_queries * (dim * _ELEMENT_BYTES[config.dtype] + _ID_BYTES) * others
    terms = local_queries * (dim + 3) * _FLOAT32_BYTES * others
    rows = local_batch * dim * _FLOAT32_BYTES * others / world_size
    sums = config.batch_size * config.views * sum(OBJECTIVES[config.objective].agreed_bytes) * others
    return round(queries + terms + rows + sums)


def report(config: PlanConfig) -> str:
    """The table and its assumptions."""
    rates = config.rates
    lines = [
        f"per rank and step of {config.batch_size:,} images, D = {config.embedding_dim}, {config.dtype} rows, "
        + config.objective
        + (f" with {config.negatives:,} negatives" if config.objective in ("nce", "infonce") else ""),
        "",
        f"{'instances':>14} {'ranks':>6} {'memory':>10} {'sent':>10} {'exchange':>10} {'objective':>10}",
    ]
    crowded = False
    for num_instances in config.instances:
        for world_size in config.world_size:
            try:
                each = cost(config, num_instances, world_size)
            except ValueError as error:
                lines.append(f"{num_instances:>14,} {world_size:>6} {error}")
                continue
            full = each.memory_bytes > config.memory_gigabytes * 1e9 / 2
            crowded |= full
            lines.append(
                f"{num_instances:>14,} {world_size:>6} {_bytes(each.memory_bytes):>10} {_bytes(each.sent_bytes):>10} "
                f"{_milliseconds(each.exchange_seconds):>10} {_milliseconds(each.objective_seconds):>10}"
                + (" *" if full else "")
            )
    if crowded:
        lines += ["", f"* bank and tables take more than half of a rank's {config.memory_gigabytes:g} GB"]
    lines += [
        "",
        f"assumed ({config.device}; {rates.source}):",
        f"  sampled rows are read at {rates.gather_bytes_per_second:.3g} bytes/s (nce), products done at "
        f"{rates.flops_per_second:.3g} operations/s (others)",
        f"  a rank sends {rates.link_bytes_per_second:.3g} bytes/s, each collective takes at least "
        f"{rates.collective_seconds:.3g} s, nothing overlaps",
        "  not counted: the network itself, its gradients (twice its size per step), evaluation, snapshots",
        "measure your own with benchmarks/objectives.py and benchmarks/scaling.py and set them as options",
    ]
    return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; 0."""
    config = tyro.cli(PlanConfig, args=arguments, prog="python -m instdisc.plan", description=__doc__)
    print(report(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
