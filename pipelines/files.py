"""The headers of many plain image files."""

import errno
import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipelines.headers import HeaderError, checksum, image_size
from pipelines.manifest import Rejected
from pipelines.scan import LeftAside, Row, Scan, progress_bar
from pipelines.strings import printable

# The threads wait for the disk, or the network behind it, not for the processor.
_THREADS = 8
_CHUNK = 256
_NOT_REGULAR = "a pipe, socket or device, expected a file"
_FOLDER = "a folder, expected a file"


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    size: int
    height: int
    width: int
    checksum: int


HeaderOrWhyNot = Header | OSError | HeaderError


def read_headers(root: Path, names: Sequence[str], *, show_progress: bool) -> list[HeaderOrWhyNot]:
    """Header of each of the files `names` (relative to `root`, or absolute), or why it has none."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    headers: list[HeaderOrWhyNot] = []
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(show_progress, len(names), " images") as bar:
        for part in pool.map(partial(_read_headers, root), chunks):
            headers += part
            bar.update(len(part))
    return headers


def scan_of_files(
    root: Path,
    names: Sequence[str],
    headers: Sequence[HeaderOrWhyNot],
    labels: Sequence[int],
    class_names: tuple[str, ...],
    left_aside: LeftAside,
) -> Scan:
    """Put the columns together; files without a header are rejected."""
    scan = Scan(root.absolute(), [], [], class_names, [], left_aside)
    for name, header, label in zip(names, headers, labels, strict=True):
        if isinstance(header, Header):
            size, height, width, summed = header
            scan.rows.append(Row(len(scan.sources), name, 0, size, height, width, label, summed))
            scan.sources.append(name)
        else:
            reason = header.strerror if isinstance(header, OSError) else None
            scan.rejected.append(Rejected(printable(name), reason or str(header)))
    return scan


def _read_headers(root: Path, names: Sequence[str]) -> list[HeaderOrWhyNot]:
    return [_read_header(root / name) for name in names]


def _read_header(path: Path) -> HeaderOrWhyNot:
    try:
        # Without waiting: who opens a pipe (FIFO) waits for somebody to write to it.
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HeaderError(_NOT_REGULAR)
            size = status.st_size
            height, width = image_size(partial(_head, file), size)
            return Header(size, height, width, checksum(partial(_part, file.fileno()), size))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without hardware
            return HeaderError(_NOT_REGULAR)
        return HeaderError(_FOLDER) if error.errno == errno.EISDIR else error
    except HeaderError as error:
        return error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _part(descriptor: int, start: int, count: int) -> bytes:
    return os.pread(descriptor, count, start)


def _head(file: io.FileIO, count: int) -> bytes:
    file.seek(0)
    return file.read(count)
