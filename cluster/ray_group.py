"""One worker group of Ray Train, from the driver's side and from the worker's. Imported only where Ray is used."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerCallback

from cluster.capacity import wait_for_room, watching_for_room
from cluster.errors import ClusterError
from cluster.failures import capture, failed_start, out_of_memory, raise_root_cause
from cluster.gpus import order_visible_gpus, require_gpu
from cluster.group import JOB_DIRECTORY, Worker
from cluster.settings import LaunchConfig
from cluster.stopping import StopBoard, Stopped, StopSignals, StopWatch

logger = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

_train: Any = ray.train  # annotated as the first version of Ray Train, which this one replaces on import
_ABORT_S = 15.0


def run_group(
    function: Callable[[Worker, P], R | Stopped],
    payload: P,
    config: LaunchConfig,
    *,
    restarting: bool,
    restarts: int,
    is_allowed: Callable[[int], bool],
    signals: StopSignals,
    name: str,
    storage: Path,
) -> R | Stopped:
    """Wait for room, run the function on a new worker group and return rank 0's value.

    Raises:
        As `cluster.launch.launch`.
    """
    group = wait_for_room(config, is_allowed, restarting=restarting)
    logger.info("starting %s", group)
    board = StopBoard(secrets.token_hex(16))
    task: Any = functools.partial(
        _run_on_worker,
        function,
        payload,
        Path.cwd(),
        board,
        {"restarts": restarts, "grace_s": signals.grace_s},
    )
    trainer: Any = _Trainer(
        task,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if group.gpus else "gloo", timeout_s=config.collective_timeout_s
        ),
        scaling_config=_train.ScalingConfig(
            num_workers=group.num_workers,
            use_gpu=group.gpus > 0,
            resources_per_worker=group.resources_per_worker,
            placement_strategy=group.strategy,
        ),
        run_config=_train.RunConfig(
            name=name,
            storage_path=str(storage / ".ray"),
            # By default Ray waits for resources and replaces reclaimed nodes without end.
            failure_config=_train.FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
            logging_config=_train.LoggingConfig(log_level="ERROR"),
            callbacks=[_SigtermCallback(board), *([_GpuCallback()] if group.gpus else [])],
        ),
    )
    try:
        with signals.passed_on(board.write), watching_for_room(group, config, is_allowed, board.write):
            value: R | Stopped = trainer.fit().return_value
        return value
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except _train.WorkerGroupError as error:
        raise_root_cause(error.worker_failures, group.num_workers, storage / ".ray")
    except _train.TrainingFailedError as error:
        raise failed_start(error) from error
    except RayError as error:
        cause = out_of_memory(str(error), storage / ".ray") or error
        raise ClusterError(f"lost the process that controls the workers: {cause}; run again") from error
    finally:
        with suppress(RayError):
            board.remove()


class _Trainer(TorchTrainer):
    """Ray's TorchTrainer, which leaves signals to `StopSignals`."""

    _controller: Any = None
    backend_config: Any

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Terminate the workers, as Ray Train does on Ctrl-C."""
        if self._controller is not None:
            with suppress(RayError):  # always raised: the controller terminates itself
                ray.get(self._controller.abort.remote(), timeout=_ABORT_S)

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out a callback that does harm here.

        The watch over the workers' reservation, which Ray frees with the job anyway, guesses which cluster is meant: on
        a machine that runs two, it dies with a traceback in the output of both; without a dashboard, it complains
        every second.
        """
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [
            _BackendCallback(self.backend_config) if isinstance(each, BackendSetupCallback) else each
            for each in callbacks
            if not isinstance(each, PlacementGroupCleanerCallback)
        ]


class _BackendCallback(BackendSetupCallback):
    """Forms the process group; leaves tearing it down to the exit of the processes, which follows immediately.

    Otherwise Ray Train waits half a minute for workers that hang or have died.
    """

    def before_execution_group_shutdown(self, execution_group: Any) -> None:
        """Do nothing."""


class _GpuCallback(WorkerCallback):
    """On a worker that was given a GPU: makes sure that it can be used, before NCCL says so in its own words."""

    def after_init_train_context(self) -> None:
        """Called before the process group is formed."""
        order_visible_gpus()
        require_gpu()


class _SigtermCallback(WorkerCallback):
    """On a worker: SIGTERM asks the group to stop; a second one kills the process, as it would without this."""

    def __init__(self, board: StopBoard) -> None:
        self._board = board

    def after_init_train_context(self) -> None:
        """Called in the main thread of the worker, which alone handles signals."""
        previous = signal.getsignal(signal.SIGTERM)
        rank = ray.train.get_context().get_world_rank()

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, previous)
            self._board.write(f"rank {rank} was sent SIGTERM")

        signal.signal(signal.SIGTERM, handle)


def _run_on_worker(
    function: Callable[[Worker, P], R], payload: P, directory: Path, board: StopBoard, told: dict[str, Any]
) -> R | None:
    """What Ray Train runs in every worker process: set up the worker, call the function, catch its error.

    Args:
        function: What to call.
        payload: Its argument.
        directory: Where the caller of `launch` is. A worker starts where its node's Ray was started.
        board: Where the group is asked to stop.
        told: What `Worker` knows from the process that launched, by the names of its attributes.
    """
    # What all threads are doing goes to the worker's standard error, which Ray shows to whoever launched.
    faulthandler.register(signal.SIGUSR1, file=2)
    try:
        worker = _this_worker(board, told)
        _set_up_logging(worker)
        # A submitted job's worker already is in its node's copy of the working directory.
        if JOB_DIRECTORY not in directory.as_posix():
            if directory.is_dir():
                os.chdir(directory)
            else:
                logger.warning("no %s on this node: relative paths start at %s", directory, Path.cwd())
        value = function(worker, payload)
    except BaseException as error:
        raise capture(error) from None
    return value if worker.is_rank_zero else None


def _this_worker(board: StopBoard, told: dict[str, Any]) -> Worker:
    """Collectives: one; every worker must call."""
    context = ray.train.get_context()
    nodes = [""] * context.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
        device=ray.train.torch.get_device(),
        stop_watch=StopWatch(board, frozenset(nodes)),
        **told,
    )


def _set_up_logging(worker: Worker) -> None:
    logging.basicConfig(
        level=logging.INFO if worker.is_rank_zero else logging.WARNING,
        format=f"%(asctime)s [{worker.rank}/{worker.world_size}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # Ray Train prints every failing worker's traceback; the caller of `launch` gets the one that matters.
    logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)
