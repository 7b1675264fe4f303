"""Settings of worker groups, of actors and of the metrics that they serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["PACK", "SPREAD", "STRICT_SPREAD"]


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the workers run and what each of them gets."""

    num_workers: int | None = None
    """Workers in the group. None: one per GPU of the cluster, two on a cluster without any. 0: this process,
    without Ray."""
    min_workers: int | None = None
    """Continue with fewer workers, at least this many, while the cluster has no room for all. None: never."""
    cpus_per_worker: float | None = None
    """CPUs reserved for, and threads used by, each worker. None: an equal share of the cluster's; of an elastic group
    that at its first start."""
    gpus_per_worker: int | None = None
    """0 or 1. None: 1 if the cluster has GPUs. Say 1 where GPU nodes start on demand."""
    strategy: Strategy = "PACK"
    """PACK fills one node after the other, SPREAD alternates, STRICT_SPREAD puts one worker on a node."""
    autoscaling: bool = False
    """The cluster adds nodes on demand. An elastic group then requests all that it can use (except with
    STRICT_SPREAD), and requests beyond the current nodes wait instead of failing."""
    wait_s: float = 300.0
    """Seconds to wait for resources that are busy or still starting before giving up."""
    collective_timeout_s: int = 600
    """Seconds after which a collective that a worker never joins fails."""
    max_restarts: int = 0
    """How many times to restart after losing a worker or node. Where `num_workers` is None the new group is as large
    as the cluster and the batch size allow at that point. Errors of the program itself are never retried; a drained
    node does not count."""
    stop_grace_s: float = 60.0
    """Seconds that the workers have to save and stop after Ctrl-C or SIGTERM. 0: they are killed immediately."""

    def __post_init__(self) -> None:
        """Validate the values."""
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")
        if self.min_workers is not None and not 1 <= self.min_workers <= (
            self.num_workers or self.min_workers
        ):
            raise ValueError(
                f"min_workers must be from 1 to num_workers ({self.num_workers}), got {self.min_workers}"
            )
        if self.autoscaling and self.min_workers is not None and self.num_workers is None:
            raise ValueError(
                "autoscaling with min_workers needs num_workers: how many to ask the cluster for"
            )
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker must be above 0, got {self.cpus_per_worker}")
        if self.gpus_per_worker not in (None, 0, 1):
            raise ValueError(
                f"gpus_per_worker must be 0 or 1 (a rank computes on one), got {self.gpus_per_worker}"
            )
        if not (self.wait_s >= 1 and self.collective_timeout_s >= 1 and self.max_restarts >= 0):
            raise ValueError("wait_s and collective_timeout_s must be 1 or more, max_restarts 0 or more")
        if not self.stop_grace_s >= 0:
            raise ValueError(f"stop_grace_s must be 0 or more, got {self.stop_grace_s}")


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    """Where the actors run and what each of them gets."""

    num_actors: int | None = None
    """Actors, each with an equal share of the rows. None: one per GPU of the cluster, two on a cluster without any.
    0: this process, without Ray."""
    cpus_per_actor: float | None = None
    """CPUs reserved for, and threads used by, each actor. None: an equal share of the cluster's."""
    gpus_per_actor: int | None = None
    """0 or 1. None: 1 if the cluster has GPUs."""

    def __post_init__(self) -> None:
        if self.num_actors is not None and self.num_actors < 0:
            raise ValueError(f"num_actors must be 0 or more, got {self.num_actors}")
        if self.cpus_per_actor is not None and not self.cpus_per_actor > 0:
            raise ValueError(f"cpus_per_actor must be above 0, got {self.cpus_per_actor}")
        if self.gpus_per_actor not in (None, 0, 1):
            raise ValueError(f"gpus_per_actor must be 0 or 1, got {self.gpus_per_actor}")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where workers serve their metrics."""

    port: int | None = 9500
    """Port of the first worker of a node; the next workers use the ports above it. 0 or None: no metrics are served."""

    def __post_init__(self) -> None:
        """Validate the port."""
        if self.port is not None and not (self.port == 0 or 1024 <= self.port <= 65_000):
            raise ValueError(
                f"metrics port is {self.port}, it must be from 1024 to 65000, or 0 for no metrics"
            )
