"""Bytes at (source, offset, size), and work done in threads ahead of the consumer."""

from __future__ import annotations

import errno
import functools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
from PIL import Image

from pipelines.cache import open_cache
from pipelines.decode import CorruptImage, decode_rgb
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.places import Place, Url, below, is_url
from pipelines.remote import Span, read_ranges
from pipelines.settings import CacheConfig

_PLACES = 65_536
_OPEN_SOURCES = 256  # well below the usual limit of 1,024 open files
# These may be about one file alone. All others (too many open files, a failing disk) strike any image next.
_ABOUT_ONE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)

Result = TypeVar("Result")


class ImageReader:
    """Reads encoded images; may be shared by threads.

    The sources used last stay open. They are read at offsets rather than memory-mapped: a file that shrinks under a
    map ends the process (SIGBUS), and a page that a network disk must fetch first would be waited for with the
    interpreter locked.

    Args:
        manifest: Where the images are.
        cache: Where tars of object storage are kept, if they are.
    """

    def __init__(self, manifest: Manifest, cache: CacheConfig | None = None) -> None:
        self._manifest = manifest
        self._place = functools.lru_cache(_PLACES)(self._place_of)
        urls = [Url(source) for source in _far_sources(manifest)] if cache else []
        self._cache = open_cache(cache) if cache and urls else None
        if self._cache:
            self._cache.want(urls)
        self._open = functools.lru_cache(_OPEN_SOURCES)(_Source)

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
            CorruptImage: If the source alone has gone, may not be read, ends too early, or is a file of another size.
            DataError: If the trouble is not with this file: the manifest's root cannot be reached, the disk or
                the network fails, or too many files are open.
        """
        (found,) = self.read_many([row])
        if isinstance(found, CorruptImage):
            raise found
        return found

    def read_many(self, rows: Sequence[int]) -> list[bytes | CorruptImage]:
        """Return the encoded images of some rows, or why one has none; far ones are asked for all at once.

        Raises:
            DataError: As `read`.
        """
        manifest = self._manifest
        found: list[bytes | OSError | CorruptImage] = [b""] * len(rows)
        far: dict[int, Span] = {}
        for index, row in enumerate(rows):
            source = self._place(int(manifest.source_index[row]))
            offset, size = int(manifest.offsets[row]), int(manifest.sizes[row])
            if not isinstance(source, Url):
                found[index] = self._read_near(source, row, offset, size)
            elif (kept := self._read_kept(source, offset, size)) is not None:
                found[index] = kept
            else:
                far[index] = Span(source, offset, offset + size)
        if far:
            for index, data in zip(far, read_ranges(list(far.values())), strict=True):
                found[index] = data
        return [_whole(data, int(manifest.sizes[row])) for data, row in zip(found, rows, strict=True)]

    def _place_of(self, source: int) -> Place:
        return below(self._manifest.root, self._manifest.sources[source])

    def _read_kept(self, url: Url, offset: int, size: int) -> bytes | None:
        """From the cache, if it holds the tar."""
        path = self._cache.path(url) if self._cache else None
        if self._cache is None or path is None:
            return None
        try:
            return self._open(path).read(offset, size)
        except OSError:  # somebody deleted it, or the disk fails
            self._cache.forget(url)
            return None

    def _read_near(self, path: Path, row: int, offset: int, size: int) -> bytes | CorruptImage:
        try:
            # Of what may be a file of its own one byte more, which is not there if the file is as it was.
            found = self._open(path).read(offset, size + (offset == 0))
            if offset == 0 and len(found) != size and self._manifest.file(row) is not None:
                return CorruptImage(
                    f"has changed since the images were listed: {path.stat().st_size} bytes instead of {size}"
                )
            return found[:size]
        except OSError as error:
            finding = self._finding(path, error)
            if isinstance(finding, CorruptImage):
                return finding
            raise finding from error

    def decode(self, row: int, data: bytes | None = None) -> Image.Image:
        """Return the picture of a row, RGB, of the size that the manifest says.

        Args:
            row: Which one.
            data: Its bytes, where they have been read already.

        Raises:
            CorruptImage: If it cannot be read or decoded.
            DataError: As `read`.
        """
        manifest = self._manifest
        return decode_rgb(
            self.read(row) if data is None else data,
            int(manifest.heights[row]),
            int(manifest.widths[row]),
            upright=manifest.upright,
        )

    def close(self) -> None:
        """Close all files, once nothing reads from them."""
        self._open.cache_clear()

    def _finding(self, path: Place, error: OSError) -> CorruptImage | DataError:
        if error.errno in _ABOUT_ONE_FILE:
            try:
                os.stat(os.path.join(self._manifest.root, "."))  # noqa: PTH116, PTH118  Path drops the dot
                return CorruptImage(f"cannot be read: {error.strerror}")
            except OSError as root_error:
                path, error = self._manifest.root, root_error
        if error.errno in _TOO_MANY_OPEN:
            remedy = "allow more open files (`ulimit -n`), or open fewer loaders"
        else:
            remedy = "the data must lie on storage that every node sees under this path; check that it works"
        return DataError(f"cannot read {path}: {error.strerror or error}; {remedy}")


def _whole(found: bytes | OSError | CorruptImage, size: int) -> bytes | CorruptImage:
    if isinstance(found, OSError):
        return CorruptImage(f"cannot be read: {found.strerror}")
    if isinstance(found, bytes) and len(found) < size:
        return CorruptImage(f"is cut short: {len(found)} of {size} bytes")
    return found


def _far_sources(manifest: Manifest) -> list[str]:
    """The URLs of all sources that are not local, in their order."""
    far_root = isinstance(manifest.root, Url)
    names = [str(below(manifest.root, source)) for source in manifest.sources if far_root or is_url(source)]
    return [name for name in names if is_url(name)]


class _Source:
    """A file that stays open as long as something refers to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)


class Ahead(Generic[Result]):
    """Maps requests to results in a thread pool, a few requests ahead, in order.

    Each request is cut into one piece per thread. Requests are taken from their iterator in the consumer's thread.
    An exception in a thread is raised from the `__next__` that would have returned its result.
    """

    def __init__(
        self, requests: Iterable[Request], work: Callable[[Request], Result], *, threads: int, depth: int
    ) -> None:
        """Start nothing yet.

        Args:
            requests: The work to do; may be endless.
            work: Called with pieces of requests, in any order, from any thread.
            threads: Number of threads.
            depth: Requests under way at a time.
        """
        self._requests = iter(requests)
        self._work = work
        self._threads = threads
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._under_way: deque[tuple[Request, list[Future[Result]]]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Request, list[Result]]:
        """Return the next request and the results of its pieces, in the order of its rows."""
        self._fill(self._depth)
        if not self._under_way:
            raise StopIteration
        request, futures = self._under_way.popleft()
        results = [future.result() for future in futures]
        self._fill(self._depth)  # the threads go on while the consumer works
        return request, results

    def close(self) -> None:
        """Wait for the pieces that have begun, drop the others, end the threads."""
        self._requests = iter(())
        self._under_way.clear()
        self._pool.shutdown(cancel_futures=True)

    def _fill(self, depth: int) -> None:
        while len(self._under_way) < depth and (request := next(self._requests, None)) is not None:
            pieces = np.array_split(request.rows, min(self._threads, len(request.rows)))
            futures = [self._pool.submit(self._work, Request(request.epoch, piece)) for piece in pieces]
            self._under_way.append((request, futures))
