"""How long it takes until a run goes on after a fault: workers and nodes killed, drained, hung, and runs stopped.

    python -m benchmarks.faults [--repeats 3] [--json FILE]

Every node is a Ray node of one CPU on this machine (127.0.0.2, .3, …) with one worker; the function counts in a file,
so the times are those of noticing the loss, of starting the processes (which import torch) and of forming the group,
without the reading of a snapshot. All processes share this machine's cores. Median and worst of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.cluster.counting import Count, RayNode, counting_program, ray_node
from tests.ray_cluster import RayCluster, ray_head

RAY = str(Path(sys.executable).parent / "ray")
ELASTIC = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1, "max_restarts": 1}
FIXED = {"num_workers": 2, "cpus_per_worker": 1, "max_restarts": 1}
COLLECTIVE_TIMEOUT_S = 5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    workers: str
    until: str
    seconds: float
    worst_seconds: float
    target_seconds: float | None


class Stage:
    """A cluster of one-CPU nodes beside a head without CPUs."""

    def __init__(self, cluster: RayCluster, nodes: dict[str, RayNode]) -> None:
        self.cluster, self.nodes = cluster, nodes
        self.environment = cluster.environment | {"RAY_ADDRESS": cluster.address}

    @contextmanager
    def counting(self, config: dict[str, Any]) -> Iterator[tuple[Count, subprocess.Popen[str]]]:
        """A program that counts, once its group has begun."""
        with tempfile.TemporaryDirectory() as folder:
            job = Count(Path(folder))
            with counting_program(job, config, self.environment) as program:
                job.wait_for_group(0)
                yield job, program

    def drain(self, node_id: str) -> None:
        """Tell the cluster that a node will be taken away in two minutes."""
        command = [RAY, "drain-node", f"--address={self.cluster.address}", f"--node-id={node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=benchmark"]
        command += ["--deadline-remaining-seconds=120"]
        subprocess.run(command, env=os.environ | self.environment, check=True, stdout=subprocess.DEVNULL)


def kill_worker(stage: Stage) -> float:
    """Seconds until both workers run again."""
    with stage.counting(FIXED) as (job, _):
        start = time.time()
        os.kill(job.groups[0]["workers"][1]["pid"], signal.SIGKILL)
        return seconds_to_group(job, 1, start, workers=2)


def kill_node(stage: Stage, config: dict[str, Any], workers: int) -> float:
    """Seconds until so many workers run again."""
    with stage.counting(config) as (job, _):
        start = time.time()
        stage.nodes[job.groups[0]["workers"][1]["node"]].kill()
        return seconds_to_group(job, 1, start, workers=workers)


def drain_node(stage: Stage) -> float:
    """Seconds until a worker runs on the node that is left."""
    with stage.counting(ELASTIC) as (job, _):
        stage.drain(job.groups[0]["workers"][1]["node_id"])
        start = time.time()
        return seconds_to_group(job, 1, start, workers=1)


def stop(stage: Stage) -> float:
    """Seconds from SIGTERM to the end of the program, the count saved."""
    with stage.counting(FIXED) as (_, program):
        program.send_signal(signal.SIGTERM)
        return seconds_to_end(program, 130)


def hang(stage: Stage) -> float:
    """Seconds from the worker's standstill to the end of the program."""
    config = FIXED | {"max_restarts": 0, "collective_timeout_s": COLLECTIVE_TIMEOUT_S}
    with stage.counting(config) as (job, program):
        os.kill(job.groups[0]["workers"][1]["pid"], signal.SIGSTOP)
        return seconds_to_end(program, 1)


def seconds_to_group(job: Count, index: int, start: float, *, workers: int) -> float:
    """From `start` to the first count of group `index`, which must have so many workers."""
    group = job.wait_for_group(index)
    if len(group["workers"]) != workers:
        raise RuntimeError(f"expected {workers} workers after the fault, got {group['workers']}")
    return float(group["time"] - start)


def seconds_to_end(program: subprocess.Popen[str], status: int) -> float:
    """From now to the end of the program, which must have this exit status."""
    start = time.time()
    said, _ = program.communicate()
    if program.returncode != status:
        raise RuntimeError(f"expected exit status {status}, got {program.returncode}: {said}")
    return time.time() - start


CASES: list[tuple[str, int, Callable[[Stage], float], str, str, float | None]] = [
    ("worker killed", 2, kill_worker, "2 → 2", "function runs again", 15),
    ("node killed, another free", 3, lambda stage: kill_node(stage, FIXED, 2), "2 → 2", "function runs again", 30),
    ("node killed, elastic group", 2, lambda stage: kill_node(stage, ELASTIC, 1), "2 → 1", "function runs again", 30),
    ("node drained, elastic group", 2, drain_node, "2 → 1", "function runs again", None),
    ("SIGTERM to the program", 2, stop, "2", "program has ended", None),
    (f"worker hung, collective timeout {COLLECTIVE_TIMEOUT_S} s", 2, hang, "2", "program has ended", None),
]  # fmt: skip
"""Fault, nodes, measurement, workers, what is waited for, target."""


def measure(repeats: int) -> Iterator[Row]:
    """One row per case, each repeat on a new cluster."""
    for fault, num_nodes, case, workers, until, target in CASES:
        seconds = []
        for _ in range(repeats):
            with ExitStack() as stack:
                cluster = stack.enter_context(ray_head(num_cpus=0))
                nodes = [
                    stack.enter_context(ray_node(cluster, f"127.0.0.{number + 2}"))
                    for number in range(num_nodes)
                ]
                seconds.append(case(Stage(cluster, {node.ip: node for node in nodes})))
        yield Row(fault, workers, until, statistics.median(seconds), max(seconds), target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    rows = []
    print("| fault | workers | until | median s | worst s | target s |\n|---|---|---|---|---|---|")
    for row in measure(arguments.repeats):
        rows.append(row)
        print(
            f"| {row.fault} | {row.workers} | {row.until} | {row.seconds:.1f} | {row.worst_seconds:.1f} | "
            f"{row.target_seconds or ''} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
