"""The loader without DALI: Pillow in threads, colour and normalisation as batched tensor operations."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.augment import ViewParameters
from pipelines.batch import Batch, LoaderJob
from pipelines.decode import CorruptImage, decode_rgb
from pipelines.order import Request
from pipelines.reader import Ahead, ImageReader

# Luma and the two chroma axes of NTSC. Hue turns the chroma plane, saturation scales it.
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_MID_GRAY = 128.0  # contrast scales the distance from it


class _Piece(NamedTuple):
    pixels: npt.NDArray[np.uint8]  # (V, b, H, W, 3), cropped, resized, flipped
    views: ViewParameters
    failures: dict[int, str]  # row -> reason


class HostLoader:
    """Implements `Loader` with Pillow and torch; gives what `DaliLoader` gives, up to rounding."""

    def __init__(self, job: LoaderJob) -> None:
        self._job = job
        self._reader = ImageReader(job.manifest)
        self._ahead = Ahead(job.requests, self._load, threads=job.threads, depth=job.prefetch)

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""
        self._ahead.close()

    def __next__(self) -> Batch:
        job = self._job
        request, pieces = next(self._ahead)
        instance_ids = request.rows.copy()
        for row, reason in (failure for piece in pieces for failure in piece.failures.items()):
            instance_ids[request.rows == row] = -1
            job.report(row, reason)
        pixels = torch.from_numpy(np.concatenate([piece.pixels for piece in pieces], axis=1)).to(job.device)
        images = torch.empty(pixels.shape, device=job.device)
        mean, std = (
            torch.tensor(values, device=job.device) * 255
            for values in (job.augmentation.mean, job.augmentation.std)
        )
        for view in range(job.views):
            colored = pixels[view].float()
            if job.changes_color:
                matrices, offsets = (
                    torch.from_numpy(np.concatenate(parts)).to(job.device)
                    for parts in zip(*(color_maps(piece.views, view) for piece in pieces), strict=True)
                )
                colored = change_color(colored, matrices, offsets)
            torch.div(colored - mean, std, out=images[view])
        return job.to_batch(images, instance_ids)

    def _load(self, request: Request) -> _Piece:
        size, manifest = self._job.augmentation.image_size, self._job.manifest
        views = self._job.view_parameters(request)
        pixels = np.zeros((self._job.views, len(request.rows), size, size, 3), np.uint8)
        failures: dict[int, str] = {}
        for index, row in enumerate(request.rows.tolist()):
            try:
                data = self._reader.read(row)
                image = decode_rgb(data, int(manifest.heights[row]), int(manifest.widths[row]))
            except CorruptImage as corrupt:
                failures[row] = str(corrupt)
                continue
            for view in range(self._job.views):
                top, left, height, width = (int(values[index, view]) for values in views[:4])
                crop = image.crop((left, top, left + width, top + height))
                resized = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
                pixels[view, index] = resized[:, ::-1] if views.flip[index, view] else resized
        return _Piece(pixels, views, failures)


def color_maps(views: ViewParameters, view: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Combine hue, saturation, contrast and brightness, in this order, to an affine map of RGB in [0, 255].

    It is the map of DALI's `color_twist`; torchvision's `ColorJitter` differs in its colour space (HSV) and in the
    centre of the contrast (the image's mean).

    Args:
        views: Parameters (B, V).
        view: Index of the view.

    Returns:
        Matrices (B, 3, 3) to be applied to RGB columns, and the offset (B,) that is added to every channel.
    """
    hue = np.deg2rad(views.hue[:, view].astype(np.float64))
    saturation, contrast, brightness = (
        values[:, view].astype(np.float64) for values in (views.saturation, views.contrast, views.brightness)
    )
    chroma = np.zeros((len(hue), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(hue)
    chroma[:, 1, 2] = saturation * np.sin(hue)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    matrices = (brightness * contrast)[:, None, None] * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)
    offsets = brightness * (1 - contrast) * _MID_GRAY
    return matrices.astype(np.float32), offsets.astype(np.float32)


def change_color(pixels: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Apply affine colour maps and round to the 256 levels of an image.

    Args:
        pixels: float32 (B, H, W, 3), in [0, 255].
        matrices: float32 (B, 3, 3).
        offsets: float32 (B,).

    Returns:
        float32 (B, H, W, 3), whole numbers in [0, 255].
    """
    flat = torch.baddbmm(offsets[:, None, None], pixels.flatten(1, 2), matrices.mT)
    return flat.clamp_(0, 255).round_().view_as(pixels)
