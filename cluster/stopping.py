"""Graceful stops: who requests one, how the workers learn of it, what their function returns."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMESPACE = "cluster.stopping"
_ASK_EVERY_S = 1.0


@dataclass(frozen=True)
class Stopped:
    """Returned by a worker function that stopped early because `Worker.stop_requested` said so, its state saved.

    Attributes:
        reason: What `stop_requested` said.
        progress: How far the function came, for the message: `step 1200`.
    """

    reason: str
    progress: str


def is_deliberate(reason: str) -> bool:
    """Whether `Stopped.reason` is a signal to the process that launched: the run does not continue by itself."""
    return reason in {number.name for number in _SIGNALS}


class RunStopped(Exception):  # noqa: N818 - not an error: the stop was requested
    """A signal stopped the run early; started again it resumes from what it saved."""


class StopSignals:
    """Ctrl-C (SIGINT), SIGTERM and the end of the terminal (SIGHUP) in the process that launches.

    While a function runs that can save and return, the first signal asks it to, and the second one raises
    KeyboardInterrupt; so does the end of the time that the function has. At all other times the first one does.
    Under `nohup` SIGHUP stays ignored.

    Args:
        grace_s: Seconds between asking and KeyboardInterrupt. 0: the first signal raises it.
    """

    def __init__(self, grace_s: float) -> None:
        self.reason: str | None = None
        """The name of the signal, once there was one."""
        self.grace_s = grace_s
        """May be lowered when it turns out that somebody else kills earlier."""
        self._ask: Callable[[str], None] | None = None
        self._answered = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._previous = {
                number: signal.signal(number, self._on_signal)
                for number in _SIGNALS
                if not _is_ignored(number)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def passed_on(self, ask: Callable[[str], None]) -> Iterator[None]:
        """For the block, pass the first signal on by `ask(reason)`, which is called in another thread."""
        self._answered = threading.Event()
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None
            self._answered.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.reason = self.reason is None, signal.Signals(number).name
        if not first or self._ask is None or self.grace_s == 0:
            raise KeyboardInterrupt
        # Not here: the main thread may hold any lock at this moment.
        threading.Thread(
            target=self._wait, args=(number, self.reason, self._ask, self._answered), daemon=True
        ).start()

    def _wait(self, number: int, reason: str, ask: Callable[[str], None], answered: threading.Event) -> None:
        warning = "%s: the workers are saving and stopping, which may take %g s; a second signal kills them"
        logger.warning(warning, reason, self.grace_s)
        try:
            ask(reason)
        except Exception as error:
            # Of any kind: the workers cannot be reached, so killing them is all that is left.
            logger.warning("the workers cannot be asked to stop: %s", error)
        if not answered.wait(self.grace_s):
            logger.warning("the workers have not stopped after %g s: killing them", self.grace_s)
            signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """For the block, let SIGTERM and SIGHUP raise KeyboardInterrupt; Ray's own handler of SIGTERM aborts."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, [number for number in _SIGNALS[1:] if not _is_ignored(number)]):
        yield


@contextmanager
def hangups_ignored() -> Iterator[None]:
    """For the block, ignore SIGHUP, which the processes that it starts then do too: who started them ends them."""
    with _handled(signal.SIG_IGN, [signal.SIGHUP]):
        yield


@contextmanager
def _handled(handler: Any, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _is_ignored(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class StopBoard:
    """Where a group of Ray workers finds out why it should stop: one key in the cluster's key-value store.

    Picklable; a process that uses it must be connected to Ray.

    Args:
        key: Different for every group that is started.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def write(self, reason: str) -> None:
        """Ask the group to stop. An earlier reason stays."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key, reason, overwrite=False, namespace=_NAMESPACE)

    def read(self) -> str | None:
        """Return why the group should stop, None if it need not."""
        from ray.experimental.internal_kv import _internal_kv_get

        value: bytes | None = _internal_kv_get(self._key, namespace=_NAMESPACE)
        return None if value is None else value.decode()

    def remove(self) -> None:
        """Delete the reason, once the group has exited."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._key, namespace=_NAMESPACE)


class StopWatch:
    """What `Worker.stop_requested` calls on a Ray worker. Polls at most once a second; a poll takes about 1 ms.

    Args:
        board: That of the group.
        nodes: Ids of the nodes of the group.
    """

    def __init__(self, board: StopBoard, nodes: frozenset[str]) -> None:
        self._board = board
        self._nodes = nodes
        self._reason: str | None = None
        self._ask_at = 0.0

    def __call__(self) -> str | None:
        """Return why the group should stop, None if it need not."""
        now = time.monotonic()
        if self._reason is None and now >= self._ask_at:
            self._ask_at = now + _ASK_EVERY_S
            try:
                self._reason = self._board.read() or self._drain()
            except Exception as error:  # of any kind; whether Ray is still there is not for this to find out
                logger.debug("cannot ask whether to stop: %s", error)
        return self._reason

    def _drain(self) -> str | None:
        for node, deadline_ms in draining_nodes().items():
            if node in self._nodes:
                left = f", {deadline_ms / 1000 - time.time():.0f} s left" if deadline_ms else ""
                return f"node {node[:8]} is being drained{left}"
        return None


def draining_nodes() -> dict[str, int]:
    """Return the nodes that are being drained, and their deadlines (Unix time in ms, 0: unknown)."""
    from ray._private.state import state  # Ray Train's own watcher has no other source either

    nodes: dict[str, int] = state.get_draining_nodes()
    return nodes
