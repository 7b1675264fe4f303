"""The labeled images that queries are compared with and classifiers are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Reference:
    """Labeled images: those of the run or index, or of another set.

    Attributes:
        labels: int64 (N,), -1 for an image without a label.
        class_names: Names of the classes, by number.
        open_images: Lists the images; raises ConfigError where only a snapshot is at hand.
        stored: Whether the bank holds a row for each of them.
    """

    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    open_images: Callable[[], Manifest]
    stored: bool

    @property
    def images(self) -> Manifest:
        """The N images."""
        return self.open_images()
