"""How an exception of a worker reaches the caller: packed in the worker, sorted and raised in the driver."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from cluster.errors import ClusterError, SnapshotError, WorkerLostError

logger = logging.getLogger(__name__)

# What gloo and NCCL say on the remaining ranks when another one hangs or has died. Both raise RuntimeError or
# a subclass of it for every kind of trouble, so only the message distinguishes them.
_TIMED_OUT = re.compile(
    r"timed out waiting \d+ ?ms|application timeout caused pair closure"
    r"|collective operation timeout|milliseconds before timing out|timed out in blocking wait"
    r"|NCCL operation timed out|NCCL timeout|client socket has timed out",
    re.IGNORECASE,
)
_LOST_PEER = re.compile(
    "connection (closed|reset|refused|was likely closed)|broken pipe|NCCL communicator was aborted"
    "|NCCL operation failed|NCCL operations have failed"
    f"|ncclRemoteError|ncclSystemError|remote process exited|{_TIMED_OUT.pattern}",
    re.IGNORECASE,
)

# What gloo puts around its message: a place in its source, and advice.
_TRIMMINGS = re.compile(r"^\[[^]]*\.cc:\d+\] | This is typically caused by.*", re.DOTALL)


# What Ray's memory monitor reports: a summary, then all candidates, then the largest processes, one per line.
_OUT_OF_MEMORY = re.compile(
    r"killed due to the node running low on memory.*?"
    r"Memory on the node \(IP: (?P<node>[^,)]+).*?was (?P<used>[\d.]+)GB used / (?P<limit>[\d.]+)GB",
    re.DOTALL,
)
_PROCESS = re.compile(r"^\d+\t(?P<memory>[\d.]+)\t(?P<command>.+)$", re.MULTILINE)
_MOST_PROCESSES, _MOST_CHARACTERS = 3, 60


class WorkerFailure(Exception):  # noqa: N818 - a parcel; whoever called `launch` never sees it
    """An exception of the worker function, made picklable for the driver.

    Attributes:
        error: The exception itself, or a `ClusterError` that quotes it where it cannot be pickled.
        trace: Its traceback as text; tracebacks do not travel.
        lost_peer: Whether it only says that another worker went away or never joined a collective.
    """

    def __init__(self, error: Exception, trace: str, lost_peer: bool) -> None:
        super().__init__(error, trace, lost_peer)  # all of it in `args`, which is what pickle restores
        self.error = error
        self.trace = trace
        self.lost_peer = lost_peer


class _WorkerTraceback(Exception):  # noqa: N818 - shown as a cause, as concurrent.futures does
    """The traceback of a worker, which Python shows above that of the driver."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def capture(error: BaseException) -> WorkerFailure:
    """Pack an exception of the worker function, with its traceback."""
    trace = "".join(traceback.format_exception(error))
    return WorkerFailure(_portable(error), trace, _says_peer_lost(error))


def raise_root_cause(failures: Mapping[int, Exception], world_size: int, directory: Path) -> NoReturn:
    """Raise the failure that the others follow from.

    An exception of the function comes first, then the death of a process, then a lost connection; the lowest
    rank among equals.

    Args:
        failures: By rank, at least one: `WorkerFailure`, or what Ray Train says of a process that died.
        world_size: Workers in the group, for the message.
        directory: Where to keep a report of Ray's that is too long for the message.

    Raises:
        WorkerLostError: If no worker raised an error of its own.
        Exception: What the worker raised, with its traceback as `__cause__`.
    """

    def precedence(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        if isinstance(failure, WorkerFailure):
            return (2 if failure.lost_peer else 0), rank
        return 1, rank

    rank = min(failures, key=precedence)
    failure = failures[rank]
    if not isinstance(failure, WorkerFailure):
        raise WorkerLostError(
            f"rank {rank} of {world_size} died: {_cause_of_death(failure, directory)}"
        ) from failure
    cause = _WorkerTraceback(failure.trace)
    if failure.lost_peer:
        slow = "; another worker hangs, or needs longer than --collective-timeout-s allows"
        hint = slow if _TIMED_OUT.search(failure.trace) else ""
        raise WorkerLostError(
            f"rank {rank} of {world_size} lost another worker: {_TRIMMINGS.sub('', str(failure.error))}{hint}"
        ) from cause
    failure.error.add_note(f"(raised on rank {rank} of {world_size})")
    raise failure.error from cause


def failed_start(error: Exception) -> ClusterError:
    """What to raise where a worker group did not form.

    Args:
        error: Of Ray Train; its last lines are about the cause.

    Returns:
        A `WorkerLostError` if the next attempt may succeed; not so where a worker's own set-up raised an error.
    """
    failure = getattr(error, "controller_failure", error)
    cause = getattr(failure, "cause", None)  # what a call of Ray's raised on the other side
    if isinstance(cause, Exception) and not _says_peer_lost(cause):
        return ClusterError(f"the workers cannot start: {cause}")
    return WorkerLostError(f"the worker group did not start: {str(failure).strip().splitlines()[-1]}")


def _portable(error: BaseException) -> Exception:
    """Return the exception if it can travel and be raised safely, else a ClusterError that quotes it."""
    if isinstance(error, Exception):
        try:
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
        except Exception:  # rebuilding from `args` may fail in any way
            pass
    return ClusterError(f"{type(error).__qualname__} in the worker function: {error}")


def _says_peer_lost(error: BaseException | None) -> bool:
    while error is not None:
        # A connection reset by storage does not mean a lost peer.
        is_peers = isinstance(error, RuntimeError) and not isinstance(error, SnapshotError)
        if is_peers and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_memory(report: str, directory: Path | None = None) -> str | None:
    """Shorten Ray's report of a process that it killed because a node ran out of memory.

    Args:
        report: With its line breaks.
        directory: Where to keep the report, as `out-of-memory.txt`; None: only in the log, at level DEBUG.

    Returns:
        One sentence: the node, its memory, its largest processes and what to do. None if the report is of another kind.
    """
    found = _OUT_OF_MEMORY.search(report)
    if found is None:
        return None
    largest = ", ".join(
        f"{process['command'][:_MOST_CHARACTERS]} {process['memory']} GB"
        for process in itertools.islice(_PROCESS.finditer(report), _MOST_PROCESSES)
    )
    logger.debug("%s", report)
    return (
        f"out of memory on node {found['node']}: {found['used']} of {found['limit']} GB used, most by "
        f"{largest or 'unknown processes'}; use fewer processes per node, a smaller batch or nodes with more memory"
        f"{_kept(report, directory)}"
    )


def _kept(report: str, directory: Path | None) -> str:
    """Write the report; returns where it is, for the end of a message."""
    if directory is None:
        return ""
    path = directory / "out-of-memory.txt"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(report + "\n")
    except OSError as error:  # a full disk must not hide why the process died
        logger.warning("Ray's report cannot be written to %s: %s", path, error)
        return ""
    return f" (Ray's report: {path})"


def _cause_of_death(failure: Exception, directory: Path) -> str:
    """Return why the process died: the sentences of Ray's report that say so, or `out_of_memory`."""
    report = str(getattr(failure, "health_check_failure", failure))
    if shortened := out_of_memory(report, directory):
        return shortened
    cause = " ".join(report.split()).rpartition("The actor is dead because ")[2]
    cause = cause.partition(" Some common causes")[0].rstrip(".")
    return (
        f"{cause} (if memory ran out, use fewer workers per node or a smaller batch; NCCL kills a process in which a "
        "collective took longer than --collective-timeout-s)"
    )
