"""Decoding every image once, to find those that a header does not give away."""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np

from pipelines.contrast import tell_nearly_constant
from pipelines.decode import CorruptImage, nearly_constant
from pipelines.errors import DataError
from pipelines.manifest import Manifest, Rejected
from pipelines.reader import ImageReader
from pipelines.scan import progress_bar

_CHUNK = 64


class _Finding(NamedTuple):
    reason: str  # why the image cannot be used; empty if it can
    is_flat: bool


_SOUND, _FLAT = _Finding("", False), _Finding("", True)


def verify(manifest: Manifest, *, show_progress: bool = True) -> Manifest:
    """Decode every image fully, to RGB, with the reader and the decoder that judge images while training.

    Warns of images that are nearly constant; they are kept.

    Args:
        manifest: What to check.
        show_progress: Whether to draw a progress bar on standard error if it takes more than a second.

    Returns:
        `manifest` itself if all is well, else one without the broken images, which are appended to `rejected`.
        The others keep their relative order, but their instance ids and the fingerprint change.

    Raises:
        DataError: No image can be decoded, or the storage fails.
    """
    findings: list[_Finding] = []
    with (
        closing(ImageReader(manifest)) as reader,
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes without the interpreter lock
        progress_bar(show_progress, len(manifest), " images") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow warns of oddities in images that it decodes all the same
        for part in _results(manifest, reader, pool):
            findings += part
            bar.update(len(part))
    tell_nearly_constant([manifest.name(row) for row, found in enumerate(findings) if found.is_flat])
    broken = [row for row, found in enumerate(findings) if found.reason]
    if not broken:
        return manifest
    rejected = [Rejected(manifest.name(row), findings[row].reason) for row in broken]
    if len(broken) == len(manifest):
        first = rejected[0]
        raise DataError(f"none of {len(manifest)} images can be decoded, e.g. {first.name}: {first.reason}")
    return manifest.select(np.delete(np.arange(len(manifest)), broken), rejected)


def _results(manifest: Manifest, reader: ImageReader, pool: ThreadPoolExecutor) -> Iterator[list[_Finding]]:
    """Chunk by chunk in row order."""
    pending: deque[Future[list[_Finding]]] = deque()
    for start in range(0, len(manifest), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(manifest)))
        pending.append(pool.submit(_check, reader, rows))
        if len(pending) > 1000:  # a manifest may have more chunks than memory has room for futures
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check(reader: ImageReader, rows: range) -> list[_Finding]:
    return [_examine(reader, row, data) for row, data in zip(rows, reader.read_many(rows), strict=True)]


def _examine(reader: ImageReader, row: int, data: bytes | CorruptImage) -> _Finding:
    try:
        if isinstance(data, CorruptImage):
            raise data
        return _FLAT if nearly_constant(reader.decode(row, data)) else _SOUND
    except CorruptImage as corrupt:
        return _Finding(str(corrupt), False)
