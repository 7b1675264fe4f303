"""Images as rows of numbers: what a network makes of them, in pieces that any process can compute."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cluster.gpus import may_use_gpu
from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.lists import normalize
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.settings import LoaderConfig

_BATCH = 256
_MOST_NAMED = 10

logger = logging.getLogger(__name__)

ImageFunction = Callable[[Any, Tensor], Tensor]
"""Importable by name: the network in evaluation mode and normalized images (B, 3, H, W) to rows (B, F)."""


def compute_device() -> torch.device:
    """The GPU of this process, if it may use one."""
    return torch.device("cuda" if may_use_gpu() else "cpu")


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """What the network gives, unit embeddings if it is the run's: the `ImageFunction` of kNN."""
    embeddings: Tensor = network(images)
    return embeddings


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """Rows computed from images as they are asked for; picklable, a source for `cluster.topk`.

    Attributes:
        manifest: Where the images are; row i of this table is made of image i.
        network: Applied on a GPU where the process has one.
        function: What to compute.
        augmentation: Size and normalization; the views are those of evaluation.
        loader: The loader of training.
    """

    manifest: Manifest
    network: nn.Module
    function: ImageFunction
    augmentation: Augmentation
    loader: LoaderConfig

    @property
    def num_rows(self) -> int:
        """Images, N."""
        return len(self.manifest)

    @torch.no_grad()
    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Compute rows start … stop - 1.

        Returns:
            float32 (stop - start, F); NaN throughout where the image cannot be decoded.

        Raises:
            DataError: The storage of the images fails, or none of a batch of images can be decoded.
        """
        device = compute_device()
        network = copy.deepcopy(self.network).to(device).eval()
        chosen = np.arange(start, stop)
        parts = []
        broken: list[int] = []

        def tell(row: int, name: str, reason: str) -> None:
            broken.append(row)
            if len(broken) <= _MOST_NAMED:
                logger.warning("%s: %s", self.manifest.root / name, reason)

        with open_loader(
            self.manifest,
            (Request(0, chosen[first : first + _BATCH]) for first in range(0, len(chosen), _BATCH)),
            augmentation=self.augmentation,
            device=device,
            config=self.loader,
            on_corrupt=tell,
        ) as loader:
            for batch in loader:
                rows = self.function(network, batch.images[0]).float()
                missing = (batch.instance_ids < 0).to(device)
                parts.append(rows.masked_fill(missing[:, None], torch.nan).cpu().numpy())
        if len(broken) > _MOST_NAMED:
            logger.warning(
                "… and %d more of %d images cannot be decoded", len(broken) - _MOST_NAMED, len(chosen)
            )
        return np.concatenate(parts)


def open_images(paths: Sequence[Path], *, upright: bool) -> Manifest:
    """A manifest of single images, in their order.

    Args:
        paths: The images.
        upright: Whether they are to be turned as their EXIF orientation says.

    Raises:
        DataError: One is missing or no image.
    """
    places = [normalize(Path.cwd(), str(path.expanduser().absolute())) for path in paths]
    once = list(dict.fromkeys(places))
    manifest = build_manifest(once, show_progress=False, upright=upright)
    if manifest.rejected:
        name, reason = manifest.rejected[0]
        raise DataError(f"{name} is not a usable image: {reason}")
    if len(manifest) != len(once):
        raise DataError(
            f"got {len(paths)} paths of {len(manifest)} images, expected image files: name no tar files"
        )
    return manifest.select(np.array([once.index(place) for place in places], np.int64))


def check_decoded(rows: npt.NDArray[np.float32], manifest: Manifest) -> None:
    """Refuse rows of `ImageRows` that were to be computed from images that cannot be decoded.

    Args:
        rows: float32 (N, F).
        manifest: The N images.

    Raises:
        DataError: There are such rows; names the first image.
    """
    broken = np.flatnonzero(~np.isfinite(rows[:, 0]))
    if len(broken):
        raise DataError(f"{manifest.name(int(broken[0]))} cannot be decoded: give another image")
