"""What a loader gets and what it gives: the vocabulary both loaders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment import Augmentation, ViewParameters, evaluation_views, training_views
from pipelines.manifest import Manifest
from pipelines.order import Request

OnCorrupt = Callable[[int, str, str], None]


class Batch(NamedTuple):
    """Images ready for the network.

    Attributes:
        images: float32 (V, B, 3, H, W) on the loader's device, normalised, channels-last in memory: the strides
            are those of a contiguous (V, B, H, W, 3) tensor.
        instance_ids: int64 (B,) on the same device; -1 where the image could not be decoded. Its pixels are then
            0, the mean colour: batches keep their shape, and such rows should get no weight.
    """

    images: torch.Tensor
    instance_ids: torch.Tensor


class Loader(Protocol):
    """An iterator over the batches of a stream of requests, in their order; to be closed after use."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> Batch: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""


@dataclass(frozen=True, kw_only=True)
class LoaderJob:
    """All that determines the batches, and how hard to work on them."""

    manifest: Manifest
    """Where the images are."""
    requests: Iterable[Request]
    """Which images to load; may be endless, is consumed a few batches ahead."""
    augmentation: Augmentation
    """Size, normalisation and, in training, the random variation of the images."""
    training: bool
    """Random views if true, else the one fixed view of evaluation."""
    views: int
    """Views per image, V; 1 in evaluation."""
    seed: int
    """Key of the random views."""
    device: torch.device
    """Where the batches go."""
    threads: int
    """Threads that decode."""
    prefetch: int
    """Batches prepared ahead of the consumer."""
    on_corrupt: OnCorrupt
    """Called with (row, name, reason) once for each image that cannot be decoded."""
    _reported: set[int] = field(default_factory=set, init=False)

    @property
    def changes_color(self) -> bool:
        """Whether any view can differ from its image in colour."""
        return self.training and self.augmentation.changes_color

    def view_parameters(self, request: Request) -> ViewParameters:
        """Return the parameters (B, V) of a request's views."""
        rows = request.rows
        heights, widths = self.manifest.heights[rows], self.manifest.widths[rows]
        if not self.training:
            return evaluation_views(self.augmentation, heights, widths)
        return training_views(
            self.augmentation, rows, heights, widths, seed=self.seed, epoch=request.epoch, views=self.views
        )

    def report(self, row: int, reason: str) -> None:
        """Tell the user about an image that cannot be decoded, unless it was told before."""
        if row not in self._reported:
            self._reported.add(row)
            self.on_corrupt(row, self.manifest.name(row), reason)

    def to_batch(self, images: torch.Tensor, instance_ids: npt.NDArray[np.int64]) -> Batch:
        """Finish a batch.

        Args:
            images: float32 (V, B, H, W, 3), contiguous; those of corrupt images are overwritten.
            instance_ids: int64 (B,), -1 where the image is corrupt.
        """
        corrupt = np.flatnonzero(instance_ids < 0)
        if len(corrupt):
            images[:, torch.from_numpy(corrupt)] = 0
        ids = torch.from_numpy(instance_ids).to(images.device, non_blocking=True)
        return Batch(images.permute(0, 1, 4, 2, 3), ids)
