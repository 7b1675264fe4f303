"""The loader without DALI: Pillow in threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.augment import ViewParameters
from pipelines.batch import Batch, Loader, LoaderJob
from pipelines.decode import CorruptImage
from pipelines.order import Request
from pipelines.reader import Ahead, ImageReader

# Luma and the two chroma axes of NTSC. Hue turns the chroma plane, saturation scales it.
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_MID_GRAY = 128.0  # contrast scales the distance from it


class _Piece(NamedTuple):
    pixels: npt.NDArray[np.uint8]  # (V, b, H, W, 3), all done but normalised
    failures: dict[int, str]  # row -> reason


class HostLoader(Loader):
    """Implements `Loader` with Pillow and torch; gives what `DaliLoader` gives, up to rounding."""

    def __init__(self, job: LoaderJob) -> None:
        self._job = job
        self._reader = ImageReader(job.manifest)
        self._ahead = Ahead(job.requests, self._load, threads=job.threads, depth=job.prefetch)

    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""
        self._ahead.close()
        self._reader.close()

    def __next__(self) -> Batch:
        job = self._job
        request, pieces = next(self._ahead)
        failures = {row: reason for piece in pieces for row, reason in piece.failures.items()}
        pixels = torch.from_numpy(np.concatenate([piece.pixels for piece in pieces], axis=1)).to(job.device)
        std = torch.tensor(job.augmentation.std, device=job.device)
        mean = torch.tensor(job.augmentation.mean, device=job.device)
        images = torch.mul(pixels, 1 / (255 * std)).sub_(mean / std)
        return job.to_batch(images, request.rows, failures)

    def _load(self, request: Request) -> _Piece:
        size = self._job.side
        views = self._job.view_parameters(request)
        colors = color_maps(views)
        pixels = np.zeros((self._job.views, len(request.rows), size, size, 3), np.uint8)
        failures: dict[int, str] = {}
        for index, row in enumerate(request.rows.tolist()):
            try:
                image = self._reader.decode(row)
            except CorruptImage as corrupt:
                failures[row] = str(corrupt)
                continue
            for view in range(self._job.views):
                top, left, height, width = (int(values[index, view]) for values in views[:4])
                box = image.crop((left, top, left + width, top + height))
                square = box.resize((size, size), Image.Resampling.BILINEAR)
                if self._job.changes_color:
                    square = square.convert("RGB", tuple(colors[index, view].ravel().tolist()))
                if views.flip[index, view]:
                    square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                pixels[view, index] = np.asarray(square)
        return _Piece(pixels, failures)


def color_maps(views: ViewParameters) -> npt.NDArray[np.float64]:
    """Combine hue, saturation, contrast and brightness, in this order, to an affine map of RGB in [0, 255].

    It is the map of DALI's `color_twist`; torchvision's `ColorJitter` differs in its colour space (HSV) and in the
    centre of the contrast (the image's mean).

    Returns:
        (B, V, 3, 4): matrices to be applied to columns (red, green, blue, 1).
    """
    hue = np.deg2rad(views.hue.astype(np.float64))
    chroma = np.zeros((*hue.shape, 3, 3))
    chroma[..., 0, 0] = 1
    chroma[..., 1, 1] = chroma[..., 2, 2] = views.saturation * np.cos(hue)
    chroma[..., 1, 2] = views.saturation * np.sin(hue)
    chroma[..., 2, 1] = -chroma[..., 1, 2]
    gain = (views.brightness * views.contrast)[..., None, None]
    offset = (views.brightness * (1 - views.contrast) * _MID_GRAY)[..., None, None]
    linear = gain * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)
    return np.concatenate([linear, np.broadcast_to(offset, (*hue.shape, 3, 1))], axis=-1)
