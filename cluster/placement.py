"""How many workers of which size a cluster has room for: arithmetic over its nodes, without Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.settings import Strategy

Node = Mapping[str, float]
"""What a node has in all, free or not, by Ray's resource names: `{"CPU": 16.0, "GPU": 2.0, …}`."""


@dataclass(frozen=True)
class WorkerGroup:
    """A number of equal workers; `str` gives the words for messages."""

    num_workers: int
    cpus: float
    gpus: int
    strategy: Strategy

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """What one worker reserves on its node, by Ray's resource names."""
        return {"CPU": self.cpus, "GPU": float(self.gpus)} if self.gpus else {"CPU": self.cpus}

    def room(self, nodes: Sequence[Node]) -> int:
        """Return how many workers of this size `nodes` hold when nothing else runs there."""
        per_node = [
            min(math.floor(node.get(name, 0.0) / asked) for name, asked in self.resources_per_worker.items())
            for node in nodes
        ]
        return sum(min(slots, 1) if self.strategy == "STRICT_SPREAD" else slots for slots in per_node)

    def __str__(self) -> str:
        size = f"{self.cpus:g} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")
        return f"{self.num_workers} worker{'s' * (self.num_workers != 1)} of {size} each ({self.strategy})"


def choose_group(
    nodes: Sequence[Node],
    *,
    num_workers: int | None,
    cpus_per_worker: float | None,
    gpus_per_worker: int | None,
    strategy: Strategy,
) -> WorkerGroup:
    """Fill in what was left open (None) from what the nodes have.

    GPUs per worker: 1 where any node has one. Workers: one per GPU, or two without GPUs (one where there is a
    single CPU). CPUs per worker: the largest whole number with which all workers still fit, at least 1; only
    nodes with GPUs count where workers use them.
    """
    gpus = min(1, _total(nodes, "GPU")) if gpus_per_worker is None else gpus_per_worker
    usable = [node for node in nodes if node.get("GPU", 0.0) >= 1] if gpus else nodes
    if num_workers is None:
        num_workers = max(1, _total(usable, "GPU") if gpus else min(2, _total(usable, "CPU")))
    if cpus_per_worker is not None:
        return WorkerGroup(num_workers, cpus_per_worker, gpus, strategy)
    largest = max((int(node.get("CPU", 0.0)) for node in usable), default=0)
    for cpus in range(min(largest, _total(usable, "CPU") // num_workers), 1, -1):
        group = WorkerGroup(num_workers, cpus, gpus, strategy)
        if group.room(usable) >= num_workers:
            return group
    return WorkerGroup(num_workers, 1, gpus, strategy)


def fitting_groups(groups: Sequence[WorkerGroup], nodes: Sequence[Node]) -> Sequence[WorkerGroup]:
    """Return those of the groups, ordered from large to small, that the nodes hold; the last one if they hold none."""
    return [group for group in groups if group.room(nodes) >= group.num_workers] or groups[-1:]


def require_room(group: WorkerGroup, nodes: Sequence[Node], option: str = "--num-workers") -> None:
    """Raise where the group could not start even if the cluster were idle.

    Args:
        group: The smallest that would do.
        nodes: Of the cluster.
        option: The flag that requested this many workers.

    Raises:
        ClusterError: With what was asked, what the nodes have, and the flag to change.
    """
    room = group.room(nodes)
    if room >= group.num_workers:
        return
    if room:
        remedy = f"ask for {option} {room} or fewer, or for less with --cpus-per-worker"
    elif group.gpus and not any(node.get("GPU", 0.0) >= 1 for node in nodes):
        remedy = "pass --gpus-per-worker 0 to train on CPUs, or join a node with a GPU"
    else:
        remedy = "lower --cpus-per-worker until a worker fits on one node"
    raise ClusterError(f"asked for {group}, but the cluster has room for {room}: {describe(nodes)}; {remedy}")


def describe(nodes: Sequence[Node]) -> str:
    """Return the nodes in words, equal ones counted: `2 nodes with 16 CPUs, 1 node with 4 CPUs`."""
    counts = Counter(amounts(node) for node in nodes)
    return ", ".join(f"{count} node{'s' * (count > 1)} with {words}" for words, count in counts.items())


def amounts(node: Node) -> str:
    """Return the CPUs and GPUs of a node in words: `16 CPUs and 2 GPUs`."""
    gpus = node.get("GPU", 0.0)
    cpus = node.get("CPU", 0.0)
    return f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "")


def _total(nodes: Sequence[Node], resource: str) -> int:
    return sum(int(node.get(resource, 0.0)) for node in nodes)
