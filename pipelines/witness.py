"""Whether what holds the images is as it was, by names, sizes and times: no image is opened."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pipelines.build import Paths, tars_of
from pipelines.errors import naming_the_cause
from pipelines.folders import walk
from pipelines.places import Place, Url
from pipelines.remote import facts
from pipelines.scan import LeftAside
from pipelines.tars import CLASS_NAMES

_THREADS = 8
_CHUNK = 256


def witness(path: Paths) -> str | None:
    """A SHA-256 (hex) that changes when images are added, removed, renamed or written again.

    It covers the names, sizes and times of modification of all files in a folder, or of the tar files with the file of
    their class names; for those in object storage the version that it tells, and without one it is never the same. It
    does not see a file that was replaced by one of its size and its time.

    Args:
        path: As for `build_manifest`.

    Returns:
        The same for the same files; None for lists of images, whose files lie anywhere.

    Raises:
        DataError: There is nothing at `path`, it cannot be read, or its storage fails.
    """
    with naming_the_cause(f"read {path}"):
        tars = tars_of(path)
        if tars:
            entries = _of_tars(tars)
        elif isinstance(path, str | Path) and Path(path).expanduser().is_dir():
            entries = _of_folder(Path(path).expanduser())
        else:
            return None
        digest = hashlib.sha256()
        for entry in entries:
            digest.update(entry)
    return digest.hexdigest()


def _of_tars(tars: Iterable[Place]) -> Iterator[bytes]:
    places = list(tars)
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_of_place, [*places, places[0].with_name(CLASS_NAMES)])


def _of_place(place: Place) -> bytes:
    if not isinstance(place, Url):
        return _of_file(place.absolute())
    try:
        size, version = facts(place)
        # Where the storage tells no version, nothing tells that the file is the same: no two witnesses are.
        return f"{place} {size} {version or uuid.uuid4()};".encode()
    except FileNotFoundError:
        return f"{place} is missing;".encode()


def _of_folder(root: Path) -> Iterator[bytes]:
    root = root.absolute()
    yield os.fsencode(root)
    names = sorted(walk(root, LeftAside()))
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(partial(_of_files, root), chunks)


def _of_files(root: Path, names: Iterable[str]) -> bytes:
    return b"".join(_of_file(root / name) for name in names)


def _of_file(path: Path) -> bytes:
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing, or a name that is not there
        return os.fsencode(f"{path} {error.errno};")
    return os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns};")
