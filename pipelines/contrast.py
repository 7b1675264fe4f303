"""Nearly constant images: counted and named, as their pixel format may have been misread."""

from __future__ import annotations

import logging

import numpy as np

from pipelines.augment import Augmentation
from pipelines.batch import Batch
from pipelines.decode import CONTRAST, CorruptImage, nearly_constant
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader
from pipelines.settings import CacheConfig

_GRID = 16  # samples to a side of a view that are looked at
_MOST_NAMED = 3

logger = logging.getLogger(__name__)


class ContrastWatch:
    """Looks at the views that pass, on the CPU: where one is flat, its image is decoded whole, once, and judged."""

    def __init__(
        self, manifest: Manifest, augmentation: Augmentation, cache: CacheConfig | None = None
    ) -> None:
        self._manifest = manifest
        self._reader = ImageReader(manifest, cache)
        gain = (1 + augmentation.brightness) * (1 + augmentation.contrast)
        self._levels = 255 * np.array(augmentation.std)  # one unit of a normalized channel
        self._flat = CONTRAST * gain  # views may have more contrast than their images
        self._judged: set[int] = set()
        self._found: list[int] = []

    def look(self, batch: Batch) -> None:
        """Judge the images of a batch that may be nearly constant."""
        step = max(1, batch.images.shape[-1] // _GRID)
        samples = batch.images.numpy()[..., ::step, ::step].reshape(*batch.images.shape[:3], -1)
        spans = (samples.max(axis=-1) - samples.min(axis=-1)) * self._levels  # (V, B, 3)
        flat = batch.instance_ids.numpy()[(spans < self._flat).all(axis=(0, 2))].tolist()
        rows = [row for row in dict.fromkeys(flat) if row >= 0 and row not in self._judged]
        self._judged.update(rows)
        for row, data in zip(rows, self._reader.read_many(rows), strict=True):
            self._judge(row, data)

    def close(self) -> None:
        """Tell what was found."""
        self._reader.close()
        tell_nearly_constant([self._manifest.name(row) for row in self._found])
        self._found.clear()

    def _judge(self, row: int, data: bytes | CorruptImage) -> None:
        try:
            if isinstance(data, bytes) and nearly_constant(self._reader.decode(row, data)):
                self._found.append(row)
        except CorruptImage:
            pass  # since it was loaded


def tell_nearly_constant(names: list[str]) -> None:
    """Warn of the images `names`, if there are any."""
    if names:
        logger.warning(
            "%d images are nearly constant, e.g. %s: look at one; their pixel format may have been misread",
            len(names),
            ", ".join(names[:_MOST_NAMED]),
        )
