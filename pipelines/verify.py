"""Decoding every image once, to find those that a header does not give away."""

import io
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from pipelines.errors import DataError
from pipelines.headers import FORMATS
from pipelines.manifest import Manifest, Rejected
from pipelines.scan import progress_bar

_CHUNK = 64


def verify(manifest: Manifest, *, workers: int | None = None, show_progress: bool = True) -> Manifest:
    """Decode every image fully, to RGB.

    Args:
        manifest: What to check.
        workers: Threads (Pillow decodes without the interpreter lock); None takes one per processor.
        show_progress: Whether to draw a progress bar on standard error if it takes more than a second.

    Returns:
        `manifest` itself if all is well, else one without the broken images, which are appended to `rejected`.
        The others keep their relative order, but their instance ids and the fingerprint change.

    Raises:
        DataError: No image can be decoded.
    """
    reasons: list[str | None] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
        progress_bar(show_progress, len(manifest), " images") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow warns of oddities in images that it decodes all the same
        for part in _results(manifest, pool):
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


def _results(manifest: Manifest, pool: ThreadPoolExecutor) -> Iterator[list[str | None]]:
    """Chunk by chunk in row order: why each image cannot be used, None if it can."""
    pending: deque[Future[list[str | None]]] = deque()
    for start in range(0, len(manifest), _CHUNK):
        pending.append(pool.submit(_check, manifest, range(start, min(start + _CHUNK, len(manifest)))))
        if len(pending) > 1000:  # a manifest may have more chunks than memory has room for futures
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check(manifest: Manifest, rows: range) -> list[str | None]:
    return [_why_not(manifest, row) for row in rows]


def _why_not(manifest: Manifest, row: int) -> str | None:
    try:
        with (manifest.root / manifest.sources[int(manifest.source_index[row])]).open("rb") as file:
            file.seek(int(manifest.offsets[row]))
            content = file.read(int(manifest.sizes[row]))
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.convert("RGB").size
    except Exception as error:  # Pillow's readers let through whatever damaged bytes make them raise
        return str(error) or type(error).__name__
    if (height, width) != (manifest.heights[row], manifest.widths[row]):
        return (
            f"{height} x {width} pixels, the manifest says {manifest.heights[row]} x {manifest.widths[row]}: "
            "the data changed, build the manifest again"
        )
    return None
