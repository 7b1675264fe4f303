"""What a worker knows of its place in the group."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

JOB_DIRECTORY = "runtime_resources/working_dir_files"


@dataclass(frozen=True)
class Worker:
    """What a worker knows of its place in the group.

    Attributes:
        rank: 0 to world_size - 1. A lost worker's place may get another rank after a restart.
        world_size: Workers in the group. In the calling process (`num_workers=0`) there is no process group.
        local_rank: Rank among the workers of the same node.
        local_world_size: Workers on the same node.
        node_rank: Number of the node among those of the group.
        device: Where this worker computes.
        restarts: How often `launch` has started again so far because a worker or node was lost.
        grace_s: Seconds from a signal to the process that launched until the workers are killed.
        stop_watch: What `stop_requested` asks.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: torch.device
    restarts: int = 0
    grace_s: float = math.inf
    stop_watch: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which speaks for the group."""
        return self.rank == 0

    def stop_requested(self) -> str | None:
        """Return why the function should save its state and return `Stopped`, None while it may continue.

        For example `SIGINT` or `node 3f21ab90 is being drained, 25 s left`. May be called every step: the cluster is
        asked about once a second, which takes a millisecond. The answer need not be the same on all ranks at a time;
        ask on rank 0 and let the others know by a collective of the function's own.
        """
        return self.stop_watch()
