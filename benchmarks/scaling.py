"""How a training step, its exchange and its bytes change with the number of ranks on one machine.

    python benchmarks/scaling.py [--instances N] [--batch B] [--steps S] [--json FILE]

Each rank is a process of its own with as many threads as its share of the cores; the batch is that of all ranks
together. Images are random: loading is measured elsewhere. The world sizes take turns. `exchange` includes waiting for
slower ranks. `planned` is the step of `python -m instdisc.plan`, whose rates come from this run: the network's and the
objective's from the steps of W = 1, shared out to the ranks as the cores are; what a rank sends, and the least that a
collective takes, from sums of a gradient's size and of one number over those ranks. Below the table stands what
recording a step's metrics costs.
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
from instdisc.settings.plan import PlanConfig
from instdisc.settings.recipes import RECIPES
from instdisc.training.costs import NetworkSize, network_size, run_cost
from instdisc.training.trainer import Trainer

WORLD_SIZES = (1, 2, 4)
ROUNDS = 3
WARM_UP = 3
IMAGE_SIZE = 32


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
        planned_seconds: What the cost model says of a step.
    """

    world_size: int
    threads: int
    step_seconds: float
    exchange_seconds: float
    sent_bytes: float
    images_per_second: float
    efficiency: float
    planned_seconds: float


@dataclass(frozen=True)
class Step:
    """One step of all ranks.

    Attributes:
        seconds: Of the slowest rank.
        exchange_seconds: Mean over the ranks.
        objective_seconds: Mean over the ranks.
        sent_bytes: Mean over the ranks.
    """

    seconds: float
    exchange_seconds: float
    objective_seconds: float
    sent_bytes: float


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
    images = torch.randn(trainer.config.objective.views, local, 3, IMAGE_SIZE, IMAGE_SIZE)
    order = torch.randperm(arguments.instances, generator=torch.Generator().manual_seed(0))
    steps: list[tuple[float, float, float, int]] = []
    for number in range(WARM_UP + arguments.steps):
        first = (number * arguments.batch + rank * local) % (arguments.instances - arguments.batch)
        trainer.exchange.barrier()
        sent, start = trainer.exchange.sent_bytes, time.perf_counter()
        trainer.step(images, trainer.announce(order[first : first + local]), 0.01)
        trainer.read()
        seconds = time.perf_counter() - start
        (spent,) = trainer.phases.finish_step()
        sent_bytes = trainer.exchange.sent_bytes - sent
        steps.append((seconds, spent["exchange"], spent["objective"], sent_bytes))
    sums: dict[int, float] = {}
    if world_size > 1:
        parameters = sum(parameter.numel() for parameter in trainer.embedder.parameters())
        sums = {size: seconds_of_a_sum(size) for size in (1, parameters)}
        dist.destroy_process_group()
    (Path(directory) / str(rank)).write_text(json.dumps([steps[WARM_UP:], list(sums.values())]))


def seconds_of_a_sum(size: int) -> float:
    """Median time of an all-reduce of so many float32 numbers."""
    times = []
    numbers = torch.zeros(size)
    for _ in range(30):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(world_size: int, arguments: argparse.Namespace) -> tuple[list[Step], list[float]]:
    """The steps; seconds of a sum of one number and of a gradient's size, if there are several ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(train, (world_size, threads, directory, arguments), nprocs=world_size)
        ranks = [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(world_size)]
    steps = [
        Step(max(seconds), statistics.mean(exchange), statistics.mean(objective), statistics.mean(sent))
        for seconds, exchange, objective, sent in (
            zip(*step, strict=True) for step in zip(*(steps for steps, _ in ranks), strict=True)
        )
    ]
    return steps, ranks[0][1]


def planned(
    world_size: int, arguments: argparse.Namespace, alone: Step, network: NetworkSize, sums: list[float]
) -> float:
    """Seconds of a step by the cost model, with rates from the steps of one rank and from sums over these ranks."""
    plan = dataclasses.replace(PlanConfig.of_run(RECIPES["sample"].config), batch_size=arguments.batch)
    # Whatever of a step is not the objective, the optimizer too, counts as the network's.
    base = run_cost(plan, network, arguments.instances, 1)
    rest = alone.seconds - alone.objective_seconds
    objective = base.step_seconds - base.network_seconds
    latency, seconds = sums or (0.0, 1.0)
    sent = 2 * 4 * network.parameters * (world_size - 1) / world_size
    plan = dataclasses.replace(
        plan,
        network_flops_per_second=plan.network_flops_per_second * base.network_seconds / rest / world_size,
        flops_per_second=plan.flops_per_second * objective / alone.objective_seconds / world_size,
        link_bytes_per_second=max(sent, 1) / max(seconds - latency, 1e-6),
        collective_seconds=latency,
    )
    return run_cost(plan, network, arguments.instances, world_size).step_seconds


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
    measured: dict[int, list[Step]] = defaultdict(list)
    sums: dict[int, list[float]] = {}
    for _ in range(ROUNDS):
        for world_size in WORLD_SIZES:
            steps, sums[world_size] = measure(world_size, arguments)
            measured[world_size] += steps
    sample = RECIPES["sample"].config
    network = network_size(sample.backbone, IMAGE_SIZE)
    medians = {
        world_size: Step(
            *(statistics.median(values) for values in zip(*map(dataclasses.astuple, steps), strict=True))
        )
        for world_size, steps in measured.items()
    }
    rows = [
        Row(
            world_size=world_size,
            threads=max(1, len(os.sched_getaffinity(0)) // world_size),
            step_seconds=step.seconds,
            exchange_seconds=step.exchange_seconds,
            sent_bytes=statistics.mean(each.sent_bytes for each in measured[world_size]),
            images_per_second=arguments.batch / step.seconds,
            efficiency=medians[1].seconds / step.seconds,
            planned_seconds=planned(world_size, arguments, medians[1], network, sums[world_size]),
        )
        for world_size, step in medians.items()
    ]
    recording = recording_seconds()
    print(
        f"ResNet-8, n = {arguments.instances:,}, batch {arguments.batch}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, gloo"
    )
    print(
        f"{'W':>2}{'threads':>9}{'step ms':>9}{'exchange ms':>13}{'sent bytes':>12}{'images/s':>10}{'of W=1':>8}"
        f"{'planned ms':>12}"
    )
    for row in rows:
        print(
            f"{row.world_size:>2}{row.threads:>9}{1e3 * row.step_seconds:>9.1f}{1e3 * row.exchange_seconds:>13.2f}"
            f"{row.sent_bytes:>12,.0f}{row.images_per_second:>10,.0f}{row.efficiency:>8.2f}"
            f"{1e3 * row.planned_seconds:>12.1f}"
        )
    print(
        f"recording metrics: {1e6 * recording:.0f} us a step, "
        f"{100 * recording / min(row.step_seconds for row in rows):.2f}% of the shortest"
    )
    if arguments.json:
        values = {"rows": [dataclasses.asdict(row) for row in rows], "recording_seconds": recording}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
