"""The loader without DALI: Pillow in threads."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.augment import Augmentation, ViewParameters, evaluation_views
from pipelines.batch import Batch, Loader, LoaderJob
from pipelines.decode import CorruptImage
from pipelines.order import Request
from pipelines.reader import Ahead, ImageReader

# Luma and the two chroma axes of NTSC. Hue turns the chroma plane, saturation scales it.
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_MID_GRAY = 128.0  # contrast scales the distance from it


class _Piece(NamedTuple):
    pixels: npt.NDArray[np.uint8]  # (V, b, H, W, 3), all done but normalized
    failures: dict[int, str]  # row -> reason


class HostLoader(Loader):
    """Implements `Loader` with Pillow and torch; gives what `DaliLoader` gives, up to rounding."""

    def __init__(self, job: LoaderJob) -> None:
        self._job = job
        self._reader = ImageReader(job.manifest, job.cache)
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
        return job.to_batch(normalized(pixels, job.augmentation), request.rows, failures)

    def _load(self, request: Request) -> _Piece:
        size = self._job.side
        views = self._job.view_parameters(request)
        colors = color_maps(views)
        pixels = np.zeros((self._job.views, len(request.rows), size, size, 3), np.uint8)
        failures: dict[int, str] = {}
        rows = request.rows.tolist()
        for index, (row, found) in enumerate(zip(rows, self._reader.read_many(rows), strict=True)):
            try:
                if isinstance(found, CorruptImage):
                    raise found
                image = self._reader.decode(row, found)
            except CorruptImage as corrupt:
                failures[row] = str(corrupt)
                continue
            for view in range(self._job.views):
                square = _square(image, views, index, view, size)
                if self._job.changes_color:
                    square = square.convert("RGB", tuple(colors[index, view].ravel().tolist()))
                if views.flip[index, view]:
                    square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                pixels[view, index] = np.asarray(square)
        return _Piece(pixels, failures)


def evaluation_pixels(image: Image.Image, augmentation: Augmentation) -> npt.NDArray[np.uint8]:
    """The one view of evaluation of a decoded RGB image, uint8 (H, W, 3), as the loader makes it."""
    views = evaluation_views(augmentation, np.array([image.height]), np.array([image.width]))
    return np.asarray(_square(image, views, 0, 0, augmentation.image_size))


def normalized(pixels: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Pixels uint8 (…, H, W, 3) with the mean subtracted and divided by the standard deviation, float32."""
    std = torch.tensor(augmentation.std, device=pixels.device)
    mean = torch.tensor(augmentation.mean, device=pixels.device)
    return torch.mul(pixels, 1 / (255 * std)).sub_(mean / std)


def _square(image: Image.Image, views: ViewParameters, index: int, view: int, side: int) -> Image.Image:
    top, left, height, width = (int(values[index, view]) for values in views[:4])
    return _resize(image.crop((left, top, left + width, top + height)), side)


def _resize(image: Image.Image, side: int) -> Image.Image:
    """Resize to a square as DALI does: what the filter sees beyond the border are the pixels at the border."""
    beyond_x, beyond_y = (math.ceil(length / side) if length > side else 0 for length in image.size)
    box = (beyond_x, beyond_y, beyond_x + image.width, beyond_y + image.height)
    if beyond_x or beyond_y:
        padding = ((beyond_y, beyond_y), (beyond_x, beyond_x), (0, 0))
        image = Image.fromarray(np.pad(np.asarray(image), padding, mode="edge"))
    return image.resize((side, side), Image.Resampling.BILINEAR, box)


def color_maps(views: ViewParameters) -> npt.NDArray[np.float64]:
    """Combine hue, saturation, contrast and brightness, in this order, to an affine map of RGB in [0, 255].

    It is the map of DALI's `color_twist`; torchvision's `ColorJitter` differs in its color space (HSV) and in the
    center of the contrast (the image's mean).

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
