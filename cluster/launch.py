"""Run one function on every worker of a group: Ray Train processes on a cluster, or this process.

The function is all a worker runs; Ray Train places the processes, forms the process group and watches them.
Ray is imported only where it is used, so that `num_workers=0` works where Ray is not installed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from cluster.errors import ClusterError, WorkerLostError
from cluster.gpus import may_use_gpu, require_gpu
from cluster.group import JOB_DIRECTORY, Worker
from cluster.session import ray_session
from cluster.settings import LaunchConfig
from cluster.stopping import RunStopped, Stopped, StopSignals

logger = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")


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
        WorkerLostError: If a worker died more often than `max_restarts`, or while the group was stopping.
        RunStopped: If Ctrl-C or SIGTERM came and the function returned `Stopped`.
        KeyboardInterrupt: If interrupted twice, or when `stop_grace_s` was over (in a submitted job, the time until Ray
            kills it, if that is less); the workers have been killed.
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
            value = _run_here(function, payload, config, signals)
    else:
        with ray_session(), signals:
            from cluster.capacity import live_nodes, settle_workers
            from cluster.jobs import stop_time_s
            from cluster.ray_group import run_group  # which imports Ray

            signals.grace_s = min(signals.grace_s, stop_time_s(config.stop_grace_s))
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
        reason = signals.reason or value.reason
        raise RunStopped(f"stopped by {reason} at {value.progress}; the next run resumes from there")
    return value


@contextmanager
def connected(config: LaunchConfig) -> Iterator[None]:
    """Be connected for the block to the cluster on which `launch` will run, unless it runs in this process.

    Tells before expensive preparations whether there will be room for the workers.

    Raises:
        ClusterError: The cluster cannot be reached, or could not hold the workers even if it were idle.
    """
    if config.num_workers == 0:
        yield
        return
    with ray_session():
        from cluster.capacity import check_capacity

        check_capacity(config)
        yield


def _run_here(
    function: Callable[[Worker, P], R | Stopped], payload: P, config: LaunchConfig, signals: StopSignals
) -> R | Stopped:
    if config.gpus_per_worker:
        require_gpu()
    cuda = config.gpus_per_worker != 0 and may_use_gpu()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    worker = Worker(0, 1, 0, 1, 0, device, grace_s=signals.grace_s, stop_watch=lambda: signals.reason)
    with signals.passed_on(lambda reason: None):
        return function(worker, payload)


def _run_until_done(
    run: Callable[..., R | Stopped], config: LaunchConfig, signals: StopSignals
) -> R | Stopped:
    """Run one group after the other until one has done its work, or was stopped by a signal."""
    restarts, restarting = 0, False
    while True:
        try:
            value = run(restarting=restarting, restarts=restarts)
        except WorkerLostError as error:
            if signals.reason:
                raise WorkerLostError(
                    f"not saved when stopped by {signals.reason}: {error}; the next run resumes from the last snapshot"
                ) from error
            if restarts == config.max_restarts:
                raise WorkerLostError(
                    f"{error}; the next run resumes from the last snapshot; with --max-restarts it does so by itself"
                ) from error
            restarts += 1
            logger.warning(
                "%s; resuming from the last snapshot (restart %d of %d)", error, restarts, config.max_restarts
            )
        else:
            if signals.reason or not isinstance(value, Stopped):
                return value
            logger.warning("%s: saved at %s, resuming from there", value.reason, value.progress)
        restarting = True
