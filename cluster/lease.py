"""A lease on a place in a storage: its holder renews it, and whoever sees it renewed no more may take it.

It works on file systems without locks and on object stores, and after the holder died with its node. The clock of one
machine is never compared with another's: the holder writes a higher number every few seconds, and a contender watches,
by its own clock, whether the number changes. Two that find the same lease free at the same moment both write; what is
there a moment later decides.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.errors import ClusterError
from cluster.storage import Storage

logger = logging.getLogger(__name__)

RENEW_S = 10.0
"""Between two renewals."""
LAPSE_S = 60.0
"""A lease that was not renewed for so long is free."""
_SETTLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host: Name of the machine or pod.
        pid: Process id there.
        since: When it got the lease, by its own clock; Unix time, to be shown only.
        process: Tells the process from all others that ever run on its machine.
        token: Different for every lease that was ever taken.
        renewals: Counted.
    """

    host: str
    pid: int
    since: float
    process: str
    token: str
    renewals: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """This process, as of now."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            process=f"{_machine()} {_started(os.getpid())}",
            token=secrets.token_hex(8),
        )

    def is_alive(self) -> bool | None:
        """Whether the process runs; None where that cannot be told from here."""
        machine, _, started = self.process.rpartition(" ")
        return started == _started(self.pid) if machine == _machine() else None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class LeaseHeldError(ClusterError):
    """Somebody else holds the lease; the message says who."""


class Lease:
    """A lease, once it is held.

    Args:
        storage: The place.
        name: Of the file.
        lost: Called once, in another thread, when somebody has taken the lease, as this process did not renew it.
    """

    def __init__(self, storage: Storage, name: str, lost: Callable[[Holder], None]) -> None:
        self._storage, self._name, self._lost = storage, name, lost
        self._mine = Holder.this_process()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, *, settle: bool) -> None:
        """Take the lease, as soon as a dead holder's has lapsed.

        Args:
            settle: Wait a moment to see whether another process took it at the same time; without, what keeps them
                apart is something else.

        Raises:
            LeaseHeldError: Its holder is alive.
            Exception: What the file system raises.
        """
        if there := self._read():
            self._await_lapse(there)
        self._write()
        if settle:
            time.sleep(_SETTLE_S)
            if (now := self._read()) and now.token != self._mine.token:
                raise LeaseHeldError(str(now))
        self._thread.start()

    def release(self) -> None:
        """Give the lease back, unless somebody else has it by now."""
        self._released.set()
        self._thread.join()
        with suppress(Exception):  # of any kind: then it lapses
            if (now := self._read()) and now.token == self._mine.token:
                self._storage.remove(self._name)

    def _await_lapse(self, there: Holder) -> None:
        alive = there.is_alive()
        if alive:
            raise LeaseHeldError(str(there))
        if alive is False:
            return
        logger.warning(
            "%s: waiting up to %g s to see whether who holds it is alive (%s)",
            self._storage.url,
            LAPSE_S,
            there,
        )
        lapses_at = time.monotonic() + LAPSE_S
        while time.monotonic() < lapses_at:
            time.sleep(RENEW_S / 10)
            now = self._read()
            if now is None:
                return
            if now != there:
                raise LeaseHeldError(str(now))

    def _renew(self) -> None:
        warned = False
        while not self._released.wait(RENEW_S):
            try:
                now = self._read()
                if now is not None and now.token != self._mine.token:
                    self._lost(now)
                    return
                self._mine = replace(self._mine, renewals=self._mine.renewals + 1)
                self._write()
                warned = False
            except Exception as error:  # every file system that fsspec opens has errors of its own
                if not warned:
                    logger.warning(
                        "%s/%s cannot be renewed (%s): after %g s another process may start there",
                        *(self._storage.url, self._name, error, LAPSE_S),
                    )
                warned = True

    def _read(self) -> Holder | None:
        return holder_of(self._storage, self._name)

    def _write(self) -> None:
        self._storage.write(self._name, json.dumps(asdict(self._mine)).encode())


def holder_of(storage: Storage, name: str) -> Holder | None:
    """Who holds a lease now, or did so last; None if nobody does, or what is there is damaged."""
    try:
        return Holder(**json.loads(storage.read(name)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _machine() -> str:
    """This machine since it was started, and which processes this one sees there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: a machine like no other
        return secrets.token_hex(8)


def _started(pid: int) -> str:
    """When a process was started, in ticks since its machine was; empty if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
