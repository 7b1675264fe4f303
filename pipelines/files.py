"""The headers of many plain image files."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipelines.headers import HeaderError, image_size
from pipelines.manifest import Rejected
from pipelines.scan import Row, Scan, progress_bar

# The threads wait for the disk, or the network behind it, not for the processor.
_THREADS = 8
_CHUNK = 256


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    size: int
    height: int
    width: int


HeaderOrWhyNot = Header | OSError | HeaderError


def read_headers(root: Path, names: Sequence[str], *, show_progress: bool) -> list[HeaderOrWhyNot]:
    """Header of each of the files `names` (relative to `root`, or absolute), or why it has none."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    headers: list[HeaderOrWhyNot] = []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress_bar(show_progress, len(names), " images") as bar,
    ):
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
) -> Scan:
    """Put the columns together; files without a header are rejected."""
    scan = Scan(root.absolute(), [], [], class_names, [])
    for name, header, label in zip(names, headers, labels, strict=True):
        if isinstance(header, Header):
            scan.rows.append(Row(len(scan.sources), name, 0, *header, label))
            scan.sources.append(name)
        else:
            reason = header.strerror if isinstance(header, OSError) else None
            scan.rejected.append(Rejected(name, reason or str(header)))
    return scan


def _read_headers(root: Path, names: Sequence[str]) -> list[HeaderOrWhyNot]:
    return [_read_header(root / name) for name in names]


def _read_header(path: Path) -> HeaderOrWhyNot:
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return Header(size, *image_size(partial(_head, file), size))
    except (OSError, HeaderError) as error:
        return error


def _head(file: io.FileIO, count: int) -> bytes:
    file.seek(0)
    return file.read(count)
