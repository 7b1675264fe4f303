"""What several ranks send, hold and agree on: every objective on 1, 2 and 4 ranks of real process groups.

    python benchmarks/ranks.py [--instances N] [--json FILE]

The same global batch is cut over the ranks. Loss and gradient of objectives that draw nothing must be those of one
rank; those that draw negatives draw others on every rank, and are compared in the tests, given what was drawn. The
bytes are those of a whole step, the updates of the bank included; only the gradients of the network come on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.base import build_objective
from instdisc.objectives.loss import loss_and_gradient
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)

WORLD_SIZES = (1, 2, 4)
DIM, BATCH = 128, 256
CASES: dict[str, ObjectiveConfig] = {
    "nce, m 512": NCEConfig(num_negatives=512),
    "nce, m 4,096": NCEConfig(),
    "infonce, m 65,536": InfoNCEConfig(),
    "softmax": SoftmaxConfig(),
    "parametric": ParametricSoftmaxConfig(),
    "spreading": SpreadingConfig(),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; the errors are relative to the largest number, None for objectives that draw."""

    objective: str
    instances: int
    world_size: int
    sent_bytes: int
    bank_megabytes: float
    loss_error: float | None
    gradient_error: float | None


def step(rank: int, world_size: int, config: ObjectiveConfig, num_instances: int) -> dict[str, Tensor]:
    """One step of this rank: what it computed, sent and holds."""
    exchange, partition = Exchange(rank, world_size), Partition(num_instances, world_size)
    start, stop = partition.start(rank), partition.stop(rank)
    bank = Bank(random_unit_rows(start, stop, DIM, seed=0), start)
    objective = build_objective(config, num_instances, bank)
    views, generator = config.views, torch.Generator().manual_seed(5)
    ids = torch.randperm(num_instances, generator=generator)[:BATCH]
    embeddings = F.normalize(torch.randn(views, BATCH, DIM, generator=generator), dim=2)
    local = BATCH // world_size
    mine = slice(rank * local, (rank + 1) * local)
    own = embeddings[:, mine].flatten(0, 1)
    draws = torch.Generator().manual_seed(rank)
    all_ids = exchange.announce(ids[mine], flag=False).ids
    result, _ = loss_and_gradient(objective, bank, exchange, own, all_ids, draws)
    # The step's means: the objective's sums, length and number of embeddings, whether a rank is sound.
    exchange.sum(torch.zeros(len(result.sums) + 2 + world_size, dtype=torch.float64))
    held = bank.rows.numel() * bank.rows.element_size()
    owned_ids, rows = exchange.route(embeddings[:, mine].mean(dim=0), all_ids.flatten(), partition)
    bank.update(owned_ids, rows, momentum=0.5, sound=torch.tensor(True))
    return {
        "loss": result.loss_Q.view(views, local),
        "gradient": result.gradient_QD.view(views, local, DIM),
        "sent": torch.tensor(exchange.sent_bytes),
        "held": torch.tensor(held),
    }


def all_steps(rank: int, world_size: int, directory: str, num_instances: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    steps = {name: step(rank, world_size, config, num_instances) for name, config in CASES.items()}
    dist.destroy_process_group()
    torch.save(steps, Path(directory) / str(rank))


def measure(num_instances: int) -> list[Row]:
    rows: list[Row] = []
    single: dict[str, list[Tensor]] = {}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(all_steps, (world_size, directory, num_instances), nprocs=world_size)
            ranks = [torch.load(Path(directory) / str(rank)) for rank in range(world_size)]
        for name, config in CASES.items():
            whole = [torch.cat([rank[name][part] for rank in ranks], dim=1) for part in ("loss", "gradient")]
            single.setdefault(name, whole)
            errors: Sequence[float | None] = [
                float((ours - theirs).abs().max() / theirs.abs().max())
                for ours, theirs in zip(whole, single[name], strict=True)
            ]
            if isinstance(config, NCEConfig | InfoNCEConfig):
                errors = [None, None]
            elif max(errors) > 1e-5:
                raise RuntimeError(f"{name} on {world_size} ranks differs from one rank by {errors}")
            sent = max(int(rank[name]["sent"]) for rank in ranks)
            held = max(int(rank[name]["held"]) for rank in ranks) / 1e6
            rows.append(Row(name, num_instances, world_size, sent, held, errors[0], errors[1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, nargs="+", default=[20_000, 1_281_167])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = [row for count in arguments.instances for row in measure(count)]
    print(f"D = {DIM}, global batch {BATCH}, torch {torch.__version__}, gloo")
    print(
        f"{'objective':<20}{'n':>11}{'W':>3}{'sent bytes':>12}{'bank MB':>9}{'loss error':>12}{'gradient error':>16}"
    )
    for row in rows:
        errors = [
            "drawn" if error is None else f"{error:.1e}" for error in (row.loss_error, row.gradient_error)
        ]
        print(
            f"{row.objective:<20}{row.instances:>11,}{row.world_size:>3}{row.sent_bytes:>12,}"
            f"{row.bank_megabytes:>9.1f}{errors[0]:>12}{errors[1]:>16}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
