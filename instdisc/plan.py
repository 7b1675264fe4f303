"""Estimate what a run needs before renting machines: `python -m instdisc.plan [--instances N …] [--world-size W …]`.

Memory and bytes follow from the sizes alone; times also from rates, which can be set.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from cluster.partition import Partition
from cluster.ranges import Count, Positive, Range, Ranged
from instdisc.common import command
from instdisc.settings.objectives import OBJECTIVES, NCEConfig, ObjectiveConfig

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT32_BYTES = 4
_ID_BYTES = 8
_BY_NAME: PrimitiveConstructorSpec[ObjectiveConfig] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{" + ",".join(OBJECTIVES) + "}",
    instance_from_str=lambda names: OBJECTIVES[names[0]](),
    is_instance=lambda value: isinstance(value, ObjectiveConfig),
    str_from_instance=lambda objective: [objective.name],
    choices=tuple(OBJECTIVES),
)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Ranged):
    """What to plan for."""

    instances: Annotated[tuple[int, ...], Range(at_least=1)] = (
        1_281_167,
        10_000_000,
        100_000_000,
        1_000_000_000,
    )
    """n, images of the data set; one or several."""
    world_size: Annotated[tuple[int, ...], Range(at_least=1)] = (8, 32, 128, 512)
    """W, workers; one or several."""
    embedding_dim: Count = 128
    """D, entries of an embedding."""
    batch_size: Count = 4096
    """Images per step over all workers."""
    objective: Annotated[ObjectiveConfig, _BY_NAME] = dataclasses.field(default_factory=NCEConfig)
    """nce and infonce compare with a sample of the rows, softmax with all of them, parametric with as many weights,
    spreading with the batch."""
    num_negatives: int | None = None
    """m of an objective that draws negatives; its own default if not given."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Type of the bank's rows."""
    memory_gigabytes: Positive = 80.0
    """Memory of a rank, in 10^9 bytes; a bank that needs more than half of it is marked."""
    gather_bytes_per_second: Positive = 0.9e12
    """Bytes of rows that a rank reads one by one; `benchmarks/objectives.py` measures it. A guess for a data-centre
    GPU; two CPU cores reached 7.6e9."""
    flops_per_second: Positive = 110e12
    """Floating-point operations of a rank's products of queries and rows. A guess for a data-centre GPU; two CPU cores
    reached 154e9."""
    link_bytes_per_second: Positive = 25e9
    """What a rank can send to others; 200 Gbit/s by default."""
    collective_seconds: float = 30e-6
    """The least that each collective of a step takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_negatives is None:
            return
        if "num_negatives" not in {field.name for field in dataclasses.fields(self.objective)}:
            raise ValueError(
                f"num_negatives is {self.num_negatives}, but {self.objective.name} draws none: omit it"
            )
        # As a field of its own it is on the command line beside the others; the objective is what counts.
        changed = dataclasses.replace(self.objective, **{"num_negatives": self.num_negatives})
        object.__setattr__(self, "objective", changed)


@dataclass(frozen=True, kw_only=True)
class Cost:
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


def report(config: PlanConfig) -> str:
    """The table and its assumptions."""
    lines = [
        f"per rank and step of {config.batch_size:,} images, D = {config.embedding_dim}, {config.dtype} rows,",
        f"{config.objective}",
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
        "rates assumed, not measured; measure yours with benchmarks/objectives.py and scaling.py and set them:",
        f"  rows read one by one at {config.gather_bytes_per_second:.3g} bytes/s, products done at "
        f"{config.flops_per_second:.3g} operations/s",
        f"  a rank sends {config.link_bytes_per_second:.3g} bytes/s, each collective takes at least "
        f"{config.collective_seconds:.3g} s, nothing overlaps",
        "  not counted: the network itself, its gradients (twice its size per step), evaluation, snapshots",
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
    """Print the plan.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_plan, arguments)


def _plan(arguments: Sequence[str]) -> None:
    config = command.read_options(
        PlanConfig, arguments, program="instdisc.plan", description="Estimate what a run will need."
    )
    print(report(config))


if __name__ == "__main__":
    sys.exit(main())
