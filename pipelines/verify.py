"""Decoding every image once, to find those that a header does not give away."""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np

from pipelines.decode import CorruptImage
from pipelines.errors import DataError
from pipelines.manifest import Manifest, Rejected
from pipelines.reader import ImageReader
from pipelines.scan import progress_bar

_CHUNK = 64


def verify(manifest: Manifest, *, workers: int | None = None, show_progress: bool = True) -> Manifest:
    """Decode every image fully, to RGB, with the reader and the decoder that judge images while training.

    Args:
        manifest: What to check.
        workers: Threads (Pillow decodes without the interpreter lock); None takes one per processor.
        show_progress: Whether to draw a progress bar on standard error if it takes more than a second.

    Returns:
        `manifest` itself if all is well, else one without the broken images, which are appended to `rejected`.
        The others keep their relative order, but their instance ids and the fingerprint change.

    Raises:
        DataError: No image can be decoded, or the storage fails.
    """
    reasons: list[str | None] = []
    with (
        closing(ImageReader(manifest)) as reader,
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
        progress_bar(show_progress, len(manifest), " images") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow warns of oddities in images that it decodes all the same
        for part in _results(manifest, reader, pool):
            reasons += part
            bar.update(len(part))
    broken = [row for row, reason in enumerate(reasons) if reason is not None]
    if not broken:
        return manifest
    rejected = [Rejected(manifest.name(row), reasons[row] or "") for row in broken]
    if len(broken) == len(manifest):
        first = rejected[0]
        raise DataError(f"none of {len(manifest)} images can be decoded, e.g. {first.name}: {first.reason}")
    return manifest.select(np.delete(np.arange(len(manifest)), broken), rejected)


def _results(manifest: Manifest, reader: ImageReader, pool: ThreadPoolExecutor) -> Iterator[list[str | None]]:
    """Chunk by chunk in row order: why each image cannot be used, None if it can."""
    pending: deque[Future[list[str | None]]] = deque()
    for start in range(0, len(manifest), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(manifest)))
        pending.append(pool.submit(_check, manifest, reader, rows))
        if len(pending) > 1000:  # a manifest may have more chunks than memory has room for futures
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check(manifest: Manifest, reader: ImageReader, rows: range) -> list[str | None]:
    return [_why_not(manifest, reader, row) for row in rows]


def _why_not(manifest: Manifest, reader: ImageReader, row: int) -> str | None:
    try:
        reader.decode(row)
    except CorruptImage as corrupt:
        return str(corrupt)
    return None
