"""Tars of object storage on the node's own disk: fetched in the background, shared by all processes of the node.

A folder holds one file for each tar, named by its URL, size and version, that appears when it is whole. Whoever holds
the lock of the folder fills it, for as long as that process lives; all others read what there is, and one of them takes
over when it ends, however it ends. Tars are taken in their order as far as they have room, and then stay, so that a
cache smaller than the data always holds the same part of it. Tars that the holder does not want make room for those it
does.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.places import Url
from pipelines.remote import Facts, Span, facts, read_ranges
from pipelines.settings import CacheConfig

_PIECE = 8 << 20
_AT_A_TIME = 4  # pieces of a tar; they are all that is held in memory
_ASKERS = 16
_LOOK_AGAIN_S = 2.0
_LOCK, _PARTIAL, _KEPT = ".lock", ".partial", ".tar"

logger = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    url: Url
    facts: Facts

    @property
    def name(self) -> str:
        """Another one for another content, as far as the storage tells."""
        identity = json.dumps([str(self.url), *self.facts])
        return hashlib.sha256(identity.encode()).hexdigest()[:40] + _KEPT


@functools.cache
def open_cache(config: CacheConfig) -> TarCache:
    """The one cache of this process in a folder."""
    return TarCache(config)


def check_cache(config: CacheConfig) -> None:
    """Refuse a folder that cannot be written to.

    Raises:
        DataError: With the reason.
    """
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        _open_lock(config.folder).close()
    except OSError as error:
        raise DataError(
            f"cannot keep tars in {config.folder}: {error.strerror}; name a writable folder on the node's own "
            "disk"
        ) from error


class TarCache:
    """Keeps tars in a folder; may be shared by threads.

    Nothing is raised when the folder cannot be used: images are then read from their storage, which is said once.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._urls: dict[Url, None] = {}
        self._kept: dict[Url, Path] = {}
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def want(self, urls: Iterable[Url]) -> None:
        """Keep these tars too, if there is room; returns at once."""
        with self._lock:
            before = len(self._urls)
            self._urls |= dict.fromkeys(urls)
            if len(self._urls) > before:
                self._changed.set()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="cache", daemon=True)
                    self._thread.start()

    def path(self, url: Url) -> Path | None:
        """Where a tar is kept whole, None if it is not."""
        return self._kept.get(url)

    def forget(self, url: Url) -> None:
        """Read a tar from its storage from now on: what is kept cannot be read."""
        self._kept.pop(url, None)

    def close(self) -> None:
        """End the filling; another process may take over. What is kept stays."""
        self._closed.set()
        self._changed.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        folder = self._config.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(_open_lock(folder)) as lock:
                self._serve(lock)
        except OSError as error:
            logger.warning(
                "cannot keep tars in %s: %s; images are read from their storage instead",
                folder,
                error.strerror,
            )
        except DataError as error:  # whoever reads images meets it too, and ends
            logger.warning("no more tars are kept in %s: %s", folder, error)

    def _serve(self, lock: _Lock) -> None:
        wanted: list[_Wanted] = []
        filled = told = False
        while not self._closed.is_set():
            if self._changed.is_set():
                self._changed.clear()
                wanted, filled = _chosen(self._look_up(), self._config.most_bytes), False
            self._find(wanted)
            if not filled and lock.acquire(wanted):
                filled = True
                self._fill_while_possible(wanted)
            elif not filled and not told and lock.is_held_for_others(wanted):
                told = True
                logger.warning(
                    "%s is being filled by another run, %s: until that ends it keeps none of the tars of this one",
                    *(self._config.folder, lock.holder()),
                )
            done = filled or all(each.url in self._kept for each in wanted)
            self._changed.wait(None if done else _LOOK_AGAIN_S)

    def _look_up(self) -> list[_Wanted]:
        urls = list(self._urls)
        with ThreadPoolExecutor(_ASKERS) as pool:
            return [_Wanted(url, found) for url, found in zip(urls, pool.map(facts, urls), strict=True)]

    def _find(self, wanted: list[_Wanted]) -> None:
        for each in wanted:
            path = self._config.folder / each.name
            with suppress(FileNotFoundError):
                if each.url not in self._kept and path.stat().st_size == each.facts.size:
                    self._kept[each.url] = path

    def _fill_while_possible(self, wanted: list[_Wanted]) -> None:
        """Keeps the lock when the disk is full, so that no other process of the node tries and says the same."""
        try:
            self._fill(wanted)
        except OSError as error:
            logger.warning(
                "%s cannot take more (%s): of %d tars %d are kept; images of the others are read from their storage",
                *(self._config.folder, error.strerror, len(self._urls), len(self._kept)),
            )

    def _fill(self, wanted: list[_Wanted]) -> None:
        """Fetch what is missing; called with the lock of the folder."""
        folder = self._config.folder
        for partial in folder.glob(f"*{_PARTIAL}"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        for each in wanted:
            if self._closed.is_set() or self._changed.is_set():
                break
            if each.url in self._kept:
                continue
            _make_room(folder, self._config.most_bytes - each.facts.size, {other.name for other in wanted})
            if self._fetch(each):
                self._find([each])

    def _fetch(self, wanted: _Wanted) -> bool:
        path = self._config.folder / wanted.name
        partial = path.with_suffix(_PARTIAL)
        data: bytes | None = b""
        try:
            with partial.open("wb") as file:
                for data in _pieces(wanted):
                    if self._closed.is_set():
                        return False
                    if data is None:
                        break
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # Asked after the last byte came: all of it is of the version that was asked for.
            if data is None or facts(wanted.url) != wanted.facts:
                logger.warning("%s changed while it was fetched; it is not kept", wanted.url)
                return False
            partial.replace(path)
            return True
        finally:
            partial.unlink(missing_ok=True)


class _Lock:
    """The lock of a folder, which the kernel takes back when its process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def acquire(self, wanted: list[_Wanted]) -> bool:
        """Whether this process holds the lock now; notes what for."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        note = {"host": socket.gethostname(), "pid": os.getpid(), "tars": _digest(wanted)}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(note).encode(), 0)
        return True

    def is_held_for_others(self, wanted: list[_Wanted]) -> bool:
        """Whether the holder wants other tars."""
        return self._note().get("tars", _digest(wanted)) != _digest(wanted)

    def holder(self) -> str:
        """Who holds it, as far as it said."""
        note = self._note()
        return f"process {note.get('pid')} on {note.get('host')}"

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)

    def _note(self) -> dict[str, object]:
        try:
            note = json.loads(os.pread(self._descriptor, 4096, 0))
            return note if isinstance(note, dict) else {}
        except ValueError:  # it is being written
            return {}


def _open_lock(folder: Path) -> _Lock:
    return _Lock(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def _digest(wanted: list[_Wanted]) -> str:
    return hashlib.sha256("".join(each.name for each in wanted).encode()).hexdigest()


def _chosen(wanted: Iterable[_Wanted], most_bytes: int) -> list[_Wanted]:
    """The first ones that have room."""
    chosen: list[_Wanted] = []
    for each in wanted:
        if each.facts.size <= most_bytes:
            most_bytes -= each.facts.size
            chosen.append(each)
    return chosen


def _make_room(folder: Path, most_bytes: int, needed: set[str]) -> None:
    """Delete tars that are not needed, the oldest first, until the others take no more than `most_bytes`."""
    sizes = {path: path.stat() for path in folder.glob(f"*{_KEPT}")}
    total = sum(status.st_size for status in sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path].st_mtime):
        if total <= most_bytes:
            return
        if path.name not in needed:
            path.unlink(missing_ok=True)
            total -= sizes[path].st_size


def _pieces(wanted: _Wanted) -> Iterable[bytes | None]:
    """The content in order; None where the file is not as it was."""
    size = wanted.facts.size
    ranges = [Span(wanted.url, start, min(start + _PIECE, size)) for start in range(0, size, _PIECE)]
    for first in range(0, len(ranges), _AT_A_TIME):
        asked = ranges[first : first + _AT_A_TIME]
        for each, data in zip(asked, read_ranges(asked), strict=True):
            yield data if isinstance(data, bytes) and len(data) == each.stop - each.start else None
