"""Run one function on every worker of a group: Ray Train processes on a cluster, or this process.

The function is all a worker runs; Ray Train places the processes, forms the process group and watches them.
Ray is imported only where it is used, so that `num_workers=0` works where Ray is not installed.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from cluster.errors import ClusterError, WorkerLostError
from cluster.placement import Strategy
from cluster.stopping import RunStopped, Stopped, StopSignals, sigterm_as_interrupt

logger = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

# Ray reads these from the environment only, most of them when it is imported. What the user has set wins.
_RAY_ENVIRONMENT = {
    # Otherwise workers move to a directory of Ray Train, and relative paths with them.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Workers name their rank themselves.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # How often to look for failed and finished workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Rank 0 looks for drained nodes itself, and `launch` starts again.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The resources have just been granted: where they are not, a node was lost since.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}
_CONNECT_S = 10.0
JOB_DIRECTORY = "runtime_resources/working_dir_files"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the workers run and what each of them gets."""

    num_workers: int | None = None
    """Workers in the group. None: one per GPU of the cluster, two on a cluster without any. 0: this process,
    without Ray."""
    min_workers: int | None = None
    """Go on with fewer workers, down to this many, while the cluster has no room for all. None: never."""
    cpus_per_worker: float | None = None
    """CPUs reserved for, and threads used by, each worker. None: an equal share of the cluster's; of an elastic group
    that at its first start."""
    gpus_per_worker: int | None = None
    """0 or 1. None: 1 if the cluster has GPUs. Say 1 where GPU nodes start on demand."""
    strategy: Strategy = "PACK"
    """PACK fills one node after the other, SPREAD alternates, STRICT_SPREAD puts one worker on a node."""
    autoscaling: bool = False
    """The cluster adds nodes that are asked for. An elastic group then asks for all that it can use (except with
    STRICT_SPREAD), and what the nodes of now cannot hold is waited for instead of refused."""
    wait_s: float = 300.0
    """Seconds to wait for resources that are busy or still starting before giving up."""
    collective_timeout_s: int = 600
    """Seconds after which a collective that a worker never joins fails."""
    max_restarts: int = 0
    """How often to start again after a worker or node was lost. Where `num_workers` is None the new group is as large
    as the cluster and the batch size allow by then. Errors of the program itself are never retried; a drained node does
    not count."""
    stop_grace_s: float = 60.0
    """Seconds that the workers have to save and stop after Ctrl-C or SIGTERM. 0: they are ended at once."""

    def __post_init__(self) -> None:
        """Refuse values that no cluster could satisfy."""
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
        losses: How often `launch` has started again so far because a worker or node was lost.
        stop_watch: What `stop_requested` asks.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: torch.device
    losses: int = 0
    stop_watch: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for the group."""
        return self.rank == 0

    def stop_requested(self) -> str | None:
        """Return why the function shall save its state and return `Stopped`, None as long as it may go on.

        For example `SIGINT` or `node 3f21ab90 is being drained, 25 s left`. May be called every step: the cluster is
        asked about once a second, which takes a millisecond. The answer need not be the same on all ranks at a time;
        ask on rank 0 and let the others know by a collective of the function's own.
        """
        return self.stop_watch()


def launch(
    function: Callable[[Worker, P], R | Stopped],
    payload: P,
    config: LaunchConfig,
    *,
    name: str,
    storage: Path,
    is_allowed: Callable[[int], bool] = lambda num_workers: True,
) -> R:
    """Run `function(worker, payload)` on every worker and return what rank 0 returned.

    With Ray, the function runs in a thread of its own process, with a process group formed (gloo for tensors
    on the CPU, NCCL for those on GPUs) and logging set up: rank 0 from INFO, the others from WARNING, all of
    it shown here. A cluster is found as Ray finds it (`RAY_ADDRESS`, a running one on this machine, the one
    that a submitted job runs on) or started on this machine and stopped afterwards.

    The function is called again on a new group after a worker was lost, as often as `max_restarts` allows, and after
    it has returned `Stopped` because a node is drained or an elastic group can grow. It finds by itself what it saved.

    Args:
        function: Importable by name on the workers. Rank 0's return value must be picklable and hold no
            tensors; the others' are dropped.
        payload: Picklable argument, the same for all workers.
        config: Where the workers run.
        name: Name of the run.
        storage: Directory that all nodes share; Ray Train's own state goes to `storage/.ray/name`.
        is_allowed: Whether a group whose size is not fixed may have this number of workers.

    Raises:
        ClusterError: If the cluster has no room for the workers or cannot be reached.
        WorkerLostError: If a worker died more often than `max_restarts`.
        RunStopped: If Ctrl-C or SIGTERM came and the function returned `Stopped`.
        KeyboardInterrupt: If interrupted twice, or when `stop_grace_s` was over; the workers have been ended.
        Exception: What the function raised, on the lowest rank whose error does not follow from another's.
            Its `__cause__` holds the worker's traceback.
    """
    storage = storage.absolute()
    if JOB_DIRECTORY in storage.as_posix():
        raise ClusterError(
            f"{storage} lies in the job's own copy of the working directory, which Ray deletes; give an absolute "
            "path that all nodes share (--run-dir)"
        )
    signals = StopSignals(config.stop_grace_s)
    if config.num_workers == 0:
        with signals:
            value = _run_here(function, payload, signals)
    else:
        with ray_session(), signals:
            from cluster.capacity import live_nodes, settle_workers
            from cluster.ray_group import run_group  # which imports Ray

            run = functools.partial(
                run_group,
                function,
                payload,
                settle_workers(config, live_nodes()),
                is_allowed=is_allowed,
                signals=signals,
                name=name,
                storage=storage,
            )
            value = _run_until_done(run, config, signals)
    if isinstance(value, Stopped):
        raise RunStopped(f"stopped by {value.reason} at {value.progress}; the next run goes on from there")
    return value


def _run_here(function: Callable[[Worker, P], R | Stopped], payload: P, signals: StopSignals) -> R | Stopped:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    worker = Worker(0, 1, 0, 1, 0, device, stop_watch=lambda: signals.reason)
    with signals.passed_on(lambda reason: None):
        return function(worker, payload)


def _run_until_done(
    run: Callable[..., R | Stopped], config: LaunchConfig, signals: StopSignals
) -> R | Stopped:
    """Run one group after the other until one has done its work, or was stopped by a signal."""
    losses, restarting = 0, False
    while True:
        try:
            value = run(restarting=restarting, losses=losses)
        except WorkerLostError as error:
            if signals.reason:
                raise RunStopped(
                    f"stopped by {signals.reason}, but {error}; the next run goes on from the last snapshot"
                ) from error
            if losses == config.max_restarts:
                raise WorkerLostError(
                    f"{error}; the next run goes on from the last snapshot, or this one by itself with --max-restarts"
                ) from error
            losses += 1
            logger.warning(
                "%s; going on from the last snapshot (restart %d of %d)", error, losses, config.max_restarts
            )
        else:
            if signals.reason or not isinstance(value, Stopped):
                return value
            logger.warning("%s: saved at %s, going on from there", value.reason, value.progress)
        restarting = True


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to a Ray cluster, starting one if there is none, and leave it as found."""
    for variable, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # That token authentication is on is no news to somebody whose cluster lives as long as the run.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if address not in ("", "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            # Ray itself would try for ever.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot reach Ray (RAY_ADDRESS is {address!r}): {error}; check that the cluster runs (`ray status`) "
            "and whether it wants RAY_AUTH_MODE=token, or do without Ray: --num-workers 0 (evaluation: --num-actors 0)"
        ) from error
    try:
        with sigterm_as_interrupt():
            yield
    finally:
        ray.shutdown()
