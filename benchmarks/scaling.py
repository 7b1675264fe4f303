"""How a training step, its exchange and its bytes change with the number of ranks on one machine.

    python benchmarks/scaling.py [--instances N] [--batch B] [--steps S] [--json FILE]

Each rank is a process of its own with as many threads as its share of the cores; the batch is that of all ranks
together. Images are random: loading is measured elsewhere. The world sizes take turns. `exchange` includes waiting for
slower ranks. Below the table stand what recording a step's metrics costs, and what a cluster would need by the cost
model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.group import Worker
from cluster.metrics import Metrics
from cluster.phases import Phases
from instdisc.common.metrics import TRAINING
from instdisc.plan import PlanConfig, report
from instdisc.settings.recipes import RECIPES
from instdisc.training.trainer import Trainer

WORLD_SIZES = (1, 2, 4)
ROUNDS = 3
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        world_size: Ranks.
        threads: Of each rank.
        step_seconds: Median over the steps of the slowest rank of each.
        exchange_seconds: Median of the mean over the ranks.
        sent_bytes: Of a rank per step, mean over ranks and steps.
        images_per_second: Of all ranks.
        efficiency: Images per second over those of one rank with all cores.
    """

    world_size: int
    threads: int
    step_seconds: float
    exchange_seconds: float
    sent_bytes: float
    images_per_second: float
    efficiency: float


def train(rank: int, world_size: int, threads: int, directory: str, arguments: argparse.Namespace) -> None:
    """Some steps on one rank; leaves its times and bytes in a file."""
    torch.set_num_threads(threads)
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    config = RECIPES["sample"].config
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, batch_size=arguments.batch)
    )
    worker = Worker(rank, world_size, rank, world_size, 0, torch.device("cpu"))
    trainer = Trainer(worker, config, arguments.instances)
    local = arguments.batch // world_size
    images = torch.randn(trainer.config.objective.views, local, 3, 32, 32)
    order = torch.randperm(arguments.instances, generator=torch.Generator().manual_seed(0))
    steps: list[tuple[float, float, int]] = []
    for number in range(WARM_UP + arguments.steps):
        first = (number * arguments.batch + rank * local) % (arguments.instances - arguments.batch)
        trainer.exchange.barrier()
        sent, start = trainer.exchange.sent_bytes, time.perf_counter()
        trainer.step(images, trainer.announce(order[first : first + local]), 0.01)
        trainer.read()
        seconds = time.perf_counter() - start
        (spent,) = trainer.phases.finish_step()
        steps.append((seconds, spent["exchange"], trainer.exchange.sent_bytes - sent))
    if world_size > 1:
        dist.destroy_process_group()
    (Path(directory) / str(rank)).write_text(json.dumps(steps[WARM_UP:]))


def measure(world_size: int, arguments: argparse.Namespace) -> list[tuple[float, float, float]]:
    """Seconds of each step, seconds of its exchange, bytes a rank sent."""
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(train, (world_size, threads, directory, arguments), nprocs=world_size)
        ranks = [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(world_size)]
    return [
        (
            max(seconds for seconds, _, _ in step),
            statistics.mean(exchange for _, exchange, _ in step),
            statistics.mean(sent for _, _, sent in step),
        )
        for step in zip(*ranks, strict=True)
    ]


def recording_seconds(repeats: int = 2000) -> float:
    """What a worker spends in a step on recording its metrics."""
    metrics, phases = Metrics(TRAINING, run="benchmark", rank=0), Phases(torch.device("cpu"))
    names = "loss learning_rate gradient_norm embedding_norm positive_similarity negative_similarity epoch"
    gauges = dict.fromkeys(names.split(), 1.0)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for name in ("exchange", "objective", "exchange", "exchange", "optimizer", "exchange"):
            with phases(name):
                pass
        for step in phases.finish_step():
            for name, seconds in step.items():
                metrics.observe(f"{name}_seconds", seconds)
        metrics.observe("step_seconds", 0.06)
        metrics.observe("data_wait_seconds", 0.001)
        metrics.add("images_total", 64)
        metrics.add("exchange_bytes_total", 100_000)
        metrics.set(**gauges)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="per world size and round")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    measured: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(ROUNDS):
        for world_size in WORLD_SIZES:
            measured[world_size] += measure(world_size, arguments)
    rows: list[Row] = []
    for world_size, steps in measured.items():
        seconds = statistics.median(step[0] for step in steps)
        rows.append(
            Row(
                world_size=world_size,
                threads=max(1, len(os.sched_getaffinity(0)) // world_size),
                step_seconds=seconds,
                exchange_seconds=statistics.median(step[1] for step in steps),
                sent_bytes=statistics.mean(step[2] for step in steps),
                images_per_second=arguments.batch / seconds,
                efficiency=(rows[0].step_seconds if rows else seconds) / seconds,
            )
        )
    recording = recording_seconds()
    print(
        f"ResNet-8, n = {arguments.instances:,}, batch {arguments.batch}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, gloo"
    )
    print(
        f"{'W':>2}{'threads':>9}{'step ms':>9}{'exchange ms':>13}{'sent bytes':>12}{'images/s':>10}{'of W=1':>8}"
    )
    for row in rows:
        print(
            f"{row.world_size:>2}{row.threads:>9}{1e3 * row.step_seconds:>9.1f}{1e3 * row.exchange_seconds:>13.2f}"
            f"{row.sent_bytes:>12,.0f}{row.images_per_second:>10,.0f}{row.efficiency:>8.2f}"
        )
    print(
        f"recording metrics: {1e6 * recording:.0f} us a step, "
        f"{100 * recording / min(row.step_seconds for row in rows):.2f}% of the shortest"
    )
    print(f"\nThe cost model of `python -m instdisc.plan`:\n\n{report(PlanConfig())}")
    if arguments.json:
        values = {"rows": [dataclasses.asdict(row) for row in rows], "recording_seconds": recording}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
