"""Who may write to a run directory, a directory of snapshots or an index: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from cluster.lease import Holder, Lease, LeaseHeldError, holder_of
from cluster.snapshots import reachable
from cluster.storage import Storage
from instdisc.common.errors import ConfigError
from instdisc.runs.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_LOCK, _LEASE, _STORE_LEASE = ".lock", ".lease", "LEASE"
INDEX_LEASE = _STORE_LEASE
"""The file of an index that says who is writing to it."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` says on file systems that cannot lock."""
_UNTIL_KILLED_S = 1.0


@contextmanager
def claim(run: RunDirectory) -> Iterator[None]:
    """Hold a run directory, which is made if need be, against other runs.

    A lock keeps processes of one machine apart from the first moment on, and of several where the file system can; a
    lease does on any file system, and ends by itself some time after its holder died with its node.

    Raises:
        ConfigError: Another run holds it, or took it while this process was suspended; or it cannot be written to.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        file = (run.path / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(
            f"cannot write to run directory {run.path} ({error}): choose another --run-dir"
        ) from error
    with file:
        storage = Storage.at(run.path)
        locked = _lock(file)
        if locked is False and holder_of(storage, _LEASE) is None:
            raise _held(storage.url, None)
        with _leased(storage, _LEASE, settle=not locked):
            yield


@contextmanager
def claim_snapshots(url: str | None) -> Iterator[None]:
    """Hold a directory of snapshots outside of the run directory (None: it is not) against other runs.

    Raises:
        ConfigError: Another run holds it, or took it while this process was suspended.
        SnapshotError: It cannot be read or written to.
    """
    if url is None:
        yield
        return
    with _leased(Storage.at(url), _STORE_LEASE, settle=True):
        yield


@contextmanager
def claim_index(url: str) -> Iterator[None]:
    """Hold an index, which is made if need be, against other processes that would change it.

    Raises:
        ConfigError: Another process holds it, or took it while this one was suspended.
        SnapshotError: It cannot be read or written to.
    """
    with _leased(Storage.at(url), _STORE_LEASE, settle=True, who="process", remedy="another --output"):
        yield


def _lock(file: IO[str]) -> bool | None:
    """Lock a file; false if somebody else has, None if the file system cannot.

    Raises:
        ConfigError: It should be able to, but fails.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # the latter as NFS may say it
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise ConfigError(
            f"cannot lock {file.name} ({error}): fix this or choose another --run-dir"
        ) from error
    return True


@contextmanager
def _leased(
    storage: Storage, name: str, *, settle: bool, who: str = "run", remedy: str = "another --run-dir"
) -> Iterator[None]:
    """Hold a lease for the block; a process that has lost it is interrupted."""
    ended, taken_by = threading.Event(), list[Holder]()

    def lost(holder: Holder) -> None:
        taken_by.append(holder)
        logger.error("another %s has taken %s (%s): stopping this one", who, storage.url, holder)
        # The first asks the workers to save, which is not theirs to do any more; the second kills them.
        os.kill(os.getpid(), signal.SIGTERM)
        if not ended.wait(_UNTIL_KILLED_S):
            os.kill(os.getpid(), signal.SIGTERM)

    lease = Lease(storage, name, lost)
    try:
        with reachable(storage.url):
            lease.acquire(settle=settle)
    except LeaseHeldError as error:
        raise _held(storage.url, str(error), who, remedy) from error
    try:
        yield
    except KeyboardInterrupt:
        if taken_by:
            raise ConfigError(
                f"another {who} has taken {storage.url} ({taken_by[0]}), since this one was suspended or could not "
                f"write there: give one of the two {remedy}"
            ) from None
        raise
    finally:
        ended.set()
        lease.release()


def _held(place: str, holder: str | None, who: str = "run", remedy: str = "another --run-dir") -> ConfigError:
    holds = f" ({holder})" if holder else ""
    return ConfigError(
        f"another {who} is writing to {place}{holds}: wait until it ends, stop it, or choose {remedy}"
    )
