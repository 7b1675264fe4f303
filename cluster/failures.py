"""How an exception of a worker reaches the caller: packed in the worker, sorted and raised in the driver."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Mapping
from typing import NoReturn

from cluster.errors import ClusterError, SnapshotError, WorkerLostError

# What gloo and NCCL say on the remaining ranks when another one hangs or has died. Both raise RuntimeError or
# a subclass of it for every kind of trouble, so only the words tell.
_TIMED_OUT = re.compile(
    r"timed out waiting \d+ ?ms|application timeout caused pair closure"
    r"|collective operation timeout|milliseconds before timing out",
    re.IGNORECASE,
)
_LOST_PEER = re.compile(
    "connection (closed|reset|refused|was likely closed)|broken pipe|NCCL communicator was aborted"
    f"|ncclRemoteError|ncclSystemError|remote process exited|{_TIMED_OUT.pattern}",
    re.IGNORECASE,
)

# What gloo puts around its message: a place in its source, and advice.
_TRIMMINGS = re.compile(r"^\[[^]]*\.cc:\d+\] | This is typically caused by.*", re.DOTALL)


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


def raise_root_cause(failures: Mapping[int, Exception], world_size: int) -> NoReturn:
    """Raise the failure that the others follow from.

    An exception of the function comes first, then the death of a process, then a lost connection; the lowest
    rank among equals.

    Args:
        failures: By rank, at least one: `WorkerFailure`, or what Ray Train says of a process that died.
        world_size: Workers in the group, for the message.

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
        raise WorkerLostError(f"rank {rank} of {world_size} died: {_cause_of_death(failure)}") from failure
    cause = _WorkerTraceback(failure.trace)
    if failure.lost_peer:
        slow = "; another worker hangs, or needs longer than --collective-timeout-s allows"
        hint = slow if _TIMED_OUT.search(failure.trace) else ""
        raise WorkerLostError(
            f"rank {rank} of {world_size} lost another worker: {_TRIMMINGS.sub('', str(failure.error))}{hint}"
        ) from cause
    failure.error.add_note(f"(raised on rank {rank} of {world_size})")
    raise failure.error from cause


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


def _cause_of_death(failure: Exception) -> str:
    """Return the sentences of Ray's report that say why the process died."""
    report = " ".join(str(getattr(failure, "health_check_failure", failure)).split())
    cause = report.rpartition("The actor is dead because ")[2].partition(" Some common causes")[0]
    return f"{cause.rstrip('.')} (where memory ran out: use fewer workers per node or a smaller batch)"
