"""The bytes of a tar file while it is listed: mapped where it is local, asked for in ranges where it is not."""

from __future__ import annotations

import io
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from pipelines.places import Place, Url
from pipelines.remote import Span, facts, read_ranges

# What is farther away than this is asked for instead of read over; a round trip is worth about as much.
_NEAR = 64 << 10
_LEAST, _MOST = 4 << 10, 2 << 20


class Content(ABC):
    """A file that is listed.

    Attributes:
        place: Where it is.
        size: Its bytes.
        file: It, opened.
        read_through: Members of up to so many bytes are best read when the walk through the file is at them.
    """

    place: Place
    size: int
    file: IO[bytes]
    read_through: int

    @abstractmethod
    def part(self, position: int, count: int) -> bytes:
        """Bytes from anywhere; may be called by several threads."""

    def prepare(self, parts: Iterable[tuple[int, int]]) -> None:
        """Have parts at hand, given by positions and counts, in the place of those before."""


@contextmanager
def open_content(place: Place) -> Iterator[Content]:
    """Open a file.

    Raises:
        OSError: It is not there or cannot be read.
        DataError: Its storage fails.
    """
    if isinstance(place, Url):
        yield _Remote(place)
        return
    with place.open("rb") as file:
        size = place.stat().st_size
        if not size:
            yield _Local(place, file, None)
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield _Local(place, file, content)


class _Local(Content):
    read_through = -1

    def __init__(self, place: Place, file: IO[bytes], content: mmap.mmap | None) -> None:
        self.place, self.file, self._content = place, file, content
        self.size = len(content) if content else 0

    def part(self, position: int, count: int) -> bytes:
        return self._content[position : position + count] if self._content else b""


class _Remote(Content):
    read_through = _NEAR

    def __init__(self, url: Url) -> None:
        self.place = self._url = url
        self.size = facts(url).size
        self.file = io.BufferedReader(_Walk(url, self.size), _LEAST)
        self._prepared: dict[int, bytes] = {}

    def part(self, position: int, count: int) -> bytes:
        held = self._prepared.get(position, b"")
        return held[:count] if len(held) >= count else _bytes(Span(self._url, position, position + count))

    def prepare(self, parts: Iterable[tuple[int, int]]) -> None:
        ranges = [Span(self._url, position, position + count) for position, count in parts]
        found = zip(ranges, read_ranges(ranges), strict=True)
        self._prepared = {wanted.start: data for wanted, data in found if isinstance(data, bytes)}


class _Walk(io.RawIOBase):
    """Reads ahead as long as it is read from the beginning to the end, twice as far each time."""

    def __init__(self, url: Url, size: int) -> None:
        self._url, self._size = url, size
        self._position = self._start = 0
        self._held = b""
        self._ahead = _LEAST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        end = self._start + len(self._held)
        if not self._start <= self._position < end and count:
            is_near = 0 <= self._position - end <= _NEAR
            self._ahead = min(2 * self._ahead, _MOST) if is_near else _LEAST
            stop = min(self._position + max(self._ahead, count), self._size)
            self._start, self._held = self._position, _bytes(Span(self._url, self._position, stop))
        start = self._position - self._start
        data = self._held[start : start + count]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_whole(place: Place) -> bytes | None:
    """A small file, None where there is none."""
    if isinstance(place, Url):
        try:
            return _bytes(Span(place, 0, facts(place).size))
        except FileNotFoundError:
            return None
    return place.read_bytes() if place.is_file() else None


def _bytes(wanted: Span) -> bytes:
    (found,) = read_ranges([wanted])
    if isinstance(found, OSError):
        raise found
    return found
