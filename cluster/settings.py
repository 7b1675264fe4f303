"""Settings of worker groups, of actors and of the metrics that they serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cluster.ranges import Amount, Count, Range, Ranged

Strategy = Literal["PACK", "SPREAD", "STRICT_SPREAD"]

_Group = Annotated[int | None, Range(at_least=0)]
_Gpus = Annotated[int | None, Range(at_least=0, at_most=1)]


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Ranged):
    """Where the workers run and what each of them gets."""

    num_workers: _Group = None
    """Workers in the group. None: one per GPU of the cluster, two on a cluster without any. 0: this process,
    without Ray."""
    min_workers: Annotated[int | None, Range(at_least=1)] = None
    """Continue with fewer workers, at least this many, while the cluster has no room for all. None: never."""
    cpus_per_worker: Annotated[float | None, Range(above=0)] = None
    """CPUs reserved for, and threads used by, each worker. None: an equal share of the cluster's; of an elastic group
    that at its first start."""
    gpus_per_worker: _Gpus = None
    """0 or 1. None: 1 if the cluster has GPUs. Say 1 where GPU nodes start on demand."""
    strategy: Strategy = "PACK"
    """PACK fills one node after the other, SPREAD alternates, STRICT_SPREAD puts one worker on a node."""
    autoscaling: bool = False
    """The cluster adds nodes on demand. An elastic group then requests all that it can use (except with
    STRICT_SPREAD), and requests beyond the current nodes wait instead of failing."""
    wait_s: Annotated[float, Range(at_least=1)] = 300.0
    """Seconds to wait for resources that are busy or still starting before giving up."""
    collective_timeout_s: Count = 600
    """Seconds after which a collective that a worker never joins fails."""
    max_restarts: Annotated[int, Range(at_least=0)] = 0
    """How many times to restart after losing a worker or node. Where `num_workers` is None the new group is as large
    as the cluster and the batch size allow at that point. Errors of the program itself are never retried; a drained
    node does not count."""
    stop_grace_s: Amount = 60.0
    """Seconds that the workers have to save and stop after Ctrl-C, SIGTERM or SIGHUP. 0: they are killed at once."""

    def __post_init__(self) -> None:
        """Validate the values."""
        super().__post_init__()
        if self.num_workers and self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, expected at most num_workers, {self.num_workers}"
            )
        if self.autoscaling and self.min_workers is not None and self.num_workers is None:
            raise ValueError(
                "autoscaling with min_workers needs num_workers: how many to ask the cluster for"
            )


@dataclass(frozen=True, kw_only=True)
class ActorsConfig(Ranged):
    """Where the actors run and what each of them gets."""

    num_actors: _Group = None
    """Actors, each with an equal share of the rows. None: one per GPU of the cluster, two on a cluster without any.
    0: this process, without Ray."""
    cpus_per_actor: Annotated[float | None, Range(above=0)] = None
    """CPUs reserved for, and threads used by, each actor. None: an equal share of the cluster's."""
    gpus_per_actor: _Gpus = None
    """0 or 1. None: 1 if the cluster has GPUs."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where workers serve their metrics."""

    port: int | None = 9500
    """Port of the first worker of a node; the next workers use the ports above it. 0 or None: no metrics are served."""

    def __post_init__(self) -> None:
        """Validate the port."""
        if self.port is not None and not (self.port == 0 or 1024 <= self.port <= 65_000):
            raise ValueError(f"port is {self.port}, expected 1024 to 65000, or 0 for no metrics")
