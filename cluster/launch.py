"""Run one function on every worker of a group: Ray Train processes on a cluster, or this process.

The function is all a worker runs; Ray Train places the processes, forms the process group and watches them.
Ray is imported only where it is used, so that `num_workers=0` works where Ray is not installed.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.errors import ClusterError, WorkerLostError
from cluster.failures import capture, raise_root_cause
from cluster.placement import Strategy, WorkerGroup, amounts, choose_group, describe, require_room

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
    # A reclaimed node ends the group, and `max_restarts` alone decides what follows.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_WAIT_SLICE_S = 15.0
_CONNECT_S = 10.0
_JOB_DIRECTORY = "runtime_resources/working_dir_files"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the workers run and what each of them gets."""

    num_workers: int | None = None
    """Workers in the group. None: one per GPU of the cluster, two on a cluster without any. 0: this process,
    without Ray."""
    cpus_per_worker: float | None = None
    """CPUs reserved for, and threads used by, each worker. None: an equal share of the cluster's."""
    gpus_per_worker: int | None = None
    """0 or 1. None: 1 if the cluster has GPUs. Say 1 where GPU nodes start on demand."""
    strategy: Strategy = "PACK"
    """PACK fills one node after the other, SPREAD alternates, STRICT_SPREAD puts one worker on a node."""
    wait_s: float = 300.0
    """Seconds to wait for resources that are busy or still starting before giving up."""
    collective_timeout_s: int = 600
    """Seconds after which a collective that a worker never joins fails."""
    max_restarts: int = 0
    """How often to start again from the beginning after a worker or node was lost. Where `num_workers` is None the
    new group is as large as the cluster allows by then. Errors of the program itself are never retried."""

    def __post_init__(self) -> None:
        """Refuse values that no cluster could satisfy."""
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker must be above 0, got {self.cpus_per_worker}")
        if self.gpus_per_worker not in (None, 0, 1):
            raise ValueError(
                f"gpus_per_worker must be 0 or 1 (a rank computes on one), got {self.gpus_per_worker}"
            )
        if not (self.wait_s >= 1 and self.collective_timeout_s >= 1 and self.max_restarts >= 0):
            raise ValueError("wait_s and collective_timeout_s must be 1 or more, max_restarts 0 or more")


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
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for the group."""
        return self.rank == 0


def launch(
    function: Callable[[Worker, P], R], payload: P, config: LaunchConfig, *, name: str, storage: Path
) -> R:
    """Run `function(worker, payload)` on every worker and return what rank 0 returned.

    With Ray, the function runs in a thread of its own process, with a process group formed (gloo for tensors
    on the CPU, NCCL for those on GPUs) and logging set up: rank 0 from INFO, the others from WARNING, all of
    it shown here. A cluster is found as Ray finds it (`RAY_ADDRESS`, a running one on this machine, the one
    that a submitted job runs on) or started on this machine and stopped afterwards.

    Args:
        function: Importable by name on the workers. Rank 0's return value must be picklable and hold no
            tensors; the others' are dropped.
        payload: Picklable argument, the same for all workers.
        config: Where the workers run.
        name: Name of the run.
        storage: Directory that all nodes share; Ray Train's own state goes to `storage/.ray/name`.

    Raises:
        ClusterError: If the cluster has no room for the workers or cannot be reached.
        WorkerLostError: If a worker died more often than `max_restarts`.
        KeyboardInterrupt: If interrupted; the workers have been stopped.
        Exception: What the function raised, on the lowest rank whose error does not follow from another's.
            Its `__cause__` holds the worker's traceback.
    """
    storage = storage.absolute()
    if _JOB_DIRECTORY in storage.as_posix():
        raise ClusterError(
            f"{storage} lies in the job's own copy of the working directory, which Ray deletes; give an absolute "
            "path that all nodes share (--run-dir)"
        )
    if config.num_workers == 0:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        return function(Worker(0, 1, 0, 1, 0, device), payload)
    task = functools.partial(_run_on_worker, function, payload, Path.cwd())
    with ray_session():
        for restart in range(1, config.max_restarts + 1):
            try:
                return _run_group(task, config, name, storage, restarting=restart > 1)
            except WorkerLostError as error:
                logger.warning("%s; restart %d of %d", error, restart, config.max_restarts)
        return _run_group(task, config, name, storage, restarting=config.max_restarts > 0)


def _run_group(
    task: Callable[[], R | None], config: LaunchConfig, name: str, storage: Path, *, restarting: bool
) -> R:
    """Wait for room, run the task on a new worker group and return rank 0's value."""
    import ray.train
    from ray.exceptions import RayError
    from ray.train.torch import TorchConfig

    train: Any = ray.train  # annotated as the first version of Ray Train, which this one replaces on import
    group = _wait_for_room(config, restarting)
    logger.info("starting %s", group)
    trainer = _trainer_class()(
        task,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if group.gpus else "gloo", timeout_s=config.collective_timeout_s
        ),
        scaling_config=train.ScalingConfig(
            num_workers=group.num_workers,
            use_gpu=group.gpus > 0,
            resources_per_worker=group.resources_per_worker,
            placement_strategy=group.strategy,
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(storage / ".ray"),
            # By default Ray waits for resources and replaces reclaimed nodes without end.
            failure_config=train.FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _interruptible():
            value: R = trainer.fit().return_value
            return value
    except train.WorkerGroupError as error:
        raise_root_cause(error.worker_failures, group.num_workers)
    except train.TrainingFailedError as error:
        raise WorkerLostError(f"the worker group did not start: {error}") from error
    except RayError as error:
        raise ClusterError(f"lost the process that controls the workers: {error}; run again") from error


def _trainer_class() -> Any:
    """Return Ray's TorchTrainer without its watch over the workers' reservation, which ends with the job anyway.

    The watch finds the cluster by guessing: on a machine that runs two, it dies with a traceback in the output of
    both; without a dashboard, it complains every second.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    return Trainer


def _wait_for_room(config: LaunchConfig, restarting: bool) -> WorkerGroup:
    """Return the group to start once the cluster has granted its resources, at most `config.wait_s` later.

    A request beyond the whole cluster is refused at once, unless more nodes may come: the cluster grows by
    itself, or a lost node is being replaced.
    """
    import ray
    from ray._private.state import state  # nothing public says whether a cluster grows by itself
    from ray.util.placement_group import placement_group, remove_placement_group

    start = time.monotonic()
    while True:
        # Looked at anew each time: nodes come and go while waiting.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        group = choose_group(
            nodes,
            num_workers=config.num_workers,
            cpus_per_worker=config.cpus_per_worker,
            gpus_per_worker=config.gpus_per_worker,
            strategy=config.strategy,
        )
        if not restarting and not state.get_max_resources_from_cluster_config():
            require_room(group, nodes)
        reservation = placement_group([group.resources_per_worker] * group.num_workers, group.strategy)
        try:
            if reservation.wait(min(_WAIT_SLICE_S, config.wait_s)):
                return group
        finally:
            remove_placement_group(reservation)
        waited = time.monotonic() - start
        free = amounts(ray.available_resources())  # type: ignore[no-untyped-call]
        if waited >= config.wait_s:
            raise ClusterError(
                f"waited {waited:.0f} s for {group}; the cluster has {describe(nodes)}, free are {free}; ask "
                "for less with --num-workers or --cpus-per-worker, wait longer with --wait-s or end other jobs"
            )
        logger.warning("waiting for %s: free are %s (%.0f of %.0f s)", group, free, waited, config.wait_s)


def _run_on_worker(function: Callable[[Worker, P], R], payload: P, directory: Path) -> R | None:
    """What Ray Train runs in every worker process: set up the worker, call the function, catch its error.

    Args:
        function: What to call.
        payload: Its argument.
        directory: Where the caller of `launch` is. A worker starts where its node's Ray was started.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
        device=ray.train.torch.get_device(),
    )
    logging.basicConfig(
        level=logging.INFO if worker.is_first else logging.WARNING,
        format=f"%(asctime)s [{worker.rank}/{worker.world_size}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # A submitted job's worker already is in its node's copy of the working directory.
    if _JOB_DIRECTORY not in directory.as_posix():
        if directory.is_dir():
            os.chdir(directory)
        else:
            logger.warning("no %s on this node: relative paths start at %s", directory, Path.cwd())
    # Ray Train prints every failing worker's traceback; the caller of `launch` gets the one that matters.
    logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)
    try:
        value = function(worker, payload)
    except BaseException as error:
        raise capture(error) from None
    return value if worker.is_first else None


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
            "and whether it wants RAY_AUTH_MODE=token, or pass --num-workers 0 to run without Ray"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ctrl-C into KeyboardInterrupt again.

    Ray Train's handler stops the workers and exits as if by `sys.exit`; and it stays installed.
    """
    handler: Any = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
