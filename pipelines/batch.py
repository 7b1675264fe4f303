"""What both loaders take and return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment import Augmentation, ViewParameters, evaluation_views, training_views
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.settings import CacheConfig

_TOO_MANY_TO_BE_CHANCE = 8  # images of a batch, none of which can be used

OnCorrupt = Callable[[int, str, str], None]


class Batch(NamedTuple):
    """Images ready for the network.

    Attributes:
        images: float32 (V, B, 3, H, W) on the loader's device, normalized, channels-last in memory: the strides
            are those of a contiguous (V, B, H, W, 3) tensor. Who may use them until when, `pipelines.handover` says.
        instance_ids: int64 (B,) on the CPU, as the host has to know them without waiting for a GPU; -1 where the
            image could not be decoded. Its pixels are then 0, the mean color: batches keep their shape, and such
            rows should get no weight.
    """

    images: torch.Tensor
    instance_ids: torch.Tensor


class Loader(ABC):
    """An iterator over the batches of a stream of requests, in their order; to be closed after use."""

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""


@dataclass(frozen=True, kw_only=True)
class LoaderJob:
    """What determines the batches and how they are produced."""

    manifest: Manifest
    """Where the images are."""
    requests: Iterable[Request]
    """Which images to load; may be endless, is consumed a few batches ahead."""
    augmentation: Augmentation
    """Size, normalization and, in training, the random variation of the images."""
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
    cache: CacheConfig | None = None
    """Where tars of object storage are kept, if they are."""
    _reported: set[int] = field(default_factory=set, init=False)

    @property
    def side(self) -> int:
        """Of the square images, in pixels."""
        smaller = self.augmentation.training_size if self.training else None
        return smaller or self.augmentation.image_size

    @property
    def changes_color(self) -> bool:
        """Whether any view can differ from its image in color."""
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

    def to_batch(
        self, images: torch.Tensor, rows: npt.NDArray[np.int64], failures: Mapping[int, str]
    ) -> Batch:
        """Finish a batch, and tell the user about its corrupt images unless they were told before.

        Args:
            images: float32 (V, B, H, W, 3), contiguous; those of corrupt images are overwritten.
            rows: int64 (B,), what was asked for.
            failures: Why an image is corrupt, by row.

        Raises:
            DataError: If no image of a batch of at least 8 can be used: then the fault is not with the images.
        """
        corrupt = np.isin(rows, list(failures))
        if len(rows) >= _TOO_MANY_TO_BE_CHANCE and corrupt.all():
            examples = [f"{self.manifest.name(row)} {reason}" for row, reason in sorted(failures.items())[:3]]
            raise DataError(
                f"none of the {len(rows)} images of a batch can be read and decoded, e.g. {'; '.join(examples)}; "
                f"check that {self.manifest.root} is on storage that every node sees and still holds the data"
            )
        for row in sorted(failures.keys() - self._reported):
            self._reported.add(row)
            self.on_corrupt(row, self.manifest.name(row), failures[row])
        if failures:
            images[:, torch.from_numpy(corrupt)] = 0
        ids = torch.from_numpy(np.where(corrupt, -1, rows))
        return Batch(images.permute(0, 1, 4, 2, 3), ids)
