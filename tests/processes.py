"""Run a function on several ranks: real processes, a real gloo group."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported these, and nothing else: importing them takes seconds.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch.distributed", "instdisc.training.trainer", "instdisc.objectives.nce"]
)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return `function(rank, world_size, *arguments)` of every rank; an exception of any rank is raised here.

    A world of one runs in this process, without a group.
    """
    if world_size == 1:
        return [function(0, 1, *arguments)]
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(
            _rank, (world_size, directory, function, arguments), nprocs=world_size, start_method="forkserver"
        )
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(rank, world_size, *arguments)
    finally:
        gc.collect()  # what still holds the group, such as a network in a caught traceback, would abort at exit
        dist.destroy_process_group()
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(result))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, but for the words: no file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
