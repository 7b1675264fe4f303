"""The loader on DALI: decoding, cropping, colour and normalisation, on the CPU or on a GPU.

DALI is fed with the bytes of the images and the parameters of their views. An image that it cannot decode ends a
DALI pipeline with all that is under way in it. The loader then finds that image, lets Pillow judge it, and feeds the
same batches to a new pipeline. As they are a pure function of the requests, none is lost, repeated or changed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, math, types
from torch.utils.dlpack import from_dlpack

from pipelines.augment import ViewParameters
from pipelines.batch import Batch, Loader, LoaderJob
from pipelines.dali_forms import may_go_to_dali
from pipelines.decode import CorruptImage, encode_pnm
from pipelines.exif import TURNS, UPRIGHT, orientation
from pipelines.order import Request
from pipelines.reader import Ahead, ImageReader
from pipelines.turns import turn_squares, views_as_stored

_READERS = 8  # threads that wait for disks rather than compute
_PLACEHOLDER = b"P6 1 1 255\n\0\0\0"  # an image of one pixel that stands in for a corrupt one
_COLORS = ("brightness", "contrast", "saturation", "hue")

logger = logging.getLogger(__name__)


class _Image(NamedTuple):
    data: bytes
    orientation: int
    fault: str = ""  # why it cannot be used; `data` is then the placeholder


@dataclass
class _Encoded:
    """A batch on its way through DALI."""

    rows: npt.NDArray[np.int64]
    images: list[bytes]
    orientations: npt.NDArray[np.int64]  # (B,); DALI decodes images as stored
    sizes: npt.NDArray[np.int32]  # (B, 2), heights and widths as shown
    views: ViewParameters  # of the images as shown
    failures: dict[int, str] = field(default_factory=dict)  # index in the batch -> reason
    converted: set[int] = field(default_factory=set)  # indices that DALI failed on and Pillow decoded

    def mark_corrupt(self, index: int, reason: str) -> None:
        self.failures[index] = reason
        self.images[index], self.orientations[index] = _PLACEHOLDER, UPRIGHT
        self.views.top[index] = self.views.left[index] = 0
        self.views.height[index] = self.views.width[index] = 1


class DaliLoader(Loader):
    """Implements `Loader` with DALI.

    Up to `job.prefetch` batches are being read while as many are under way in DALI.
    """

    def __init__(self, job: LoaderJob) -> None:
        self._job = job
        self._reader = ImageReader(job.manifest, job.cache)
        self._ahead = Ahead(job.requests, self._read, threads=_READERS, depth=job.prefetch)
        self._under_way: deque[_Encoded] = deque()
        self._pipeline: Pipeline = None
        self._failure: RuntimeError | None = None
        self._largest = 0  # images in the largest batch the pipeline takes
        self._for_pillow: set[int] = set()  # rows that DALI failed on before

    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""
        self._ahead.close()
        self._reader.close()
        self._under_way.clear()
        self._pipeline = None

    def __next__(self) -> Batch:
        if not self._under_way:  # at the start; or at the end, where nothing follows
            self._under_way.extend(self._next_encoded(self._job.prefetch))
            if not self._under_way:
                raise StopIteration
            self._start()
        images = self._collect()
        encoded = self._under_way.popleft()
        turn_squares(images, encoded.orientations, encoded.views.flip)
        for following in self._next_encoded(1):
            self._under_way.append(following)
            if len(following.rows) > self._largest:
                self._start()
            else:
                self._schedule([following])
        failures = {int(encoded.rows[index]): reason for index, reason in encoded.failures.items()}
        return self._job.to_batch(images, encoded.rows, failures)

    def _next_encoded(self, count: int) -> list[_Encoded]:
        batches: list[_Encoded] = []
        manifest = self._job.manifest
        while len(batches) < count and (read := next(self._ahead, None)) is not None:
            request, pieces = read
            images = [image for piece in pieces for image in piece]
            encoded = _Encoded(
                request.rows,
                [image.data for image in images],
                np.array([image.orientation for image in images]),
                np.stack([manifest.heights[request.rows], manifest.widths[request.rows]], axis=1),
                self._job.view_parameters(request),
            )
            for index, image in enumerate(images):
                if image.fault:
                    encoded.mark_corrupt(index, image.fault)
            batches.append(encoded)
        return batches

    def _read(self, request: Request) -> list[_Image]:
        rows = request.rows.tolist()
        return [
            self._prepare(row, found) for row, found in zip(rows, self._reader.read_many(rows), strict=True)
        ]

    def _prepare(self, row: int, data: bytes | CorruptImage) -> _Image:
        manifest = self._job.manifest
        size = int(manifest.heights[row]), int(manifest.widths[row])
        try:
            if isinstance(data, CorruptImage):
                raise data
            turn = (orientation(data) or UPRIGHT) if manifest.upright else UPRIGHT
            as_stored = size[::-1] if TURNS[turn].swap else size
            if row in self._for_pillow or not may_go_to_dali(data, *as_stored):
                data, turn = self._convert(row, data), UPRIGHT
            return _Image(data, turn)
        except CorruptImage as corrupt:
            return _Image(_PLACEHOLDER, UPRIGHT, str(corrupt))

    def _convert(self, row: int, data: bytes) -> bytes:
        return encode_pnm(self._reader.decode(row, data))

    def _start(self) -> None:
        """Build the pipeline and run it once for each batch under way."""
        self._failure = None
        self._largest = max(len(encoded.rows) for encoded in self._under_way)
        self._pipeline = self._build(self._largest, depth=len(self._under_way))
        self._schedule(self._under_way)  # the first `schedule_run` fills the pipeline's queue

    def _schedule(self, batches: Sequence[_Encoded]) -> None:
        if self._failure:
            return
        try:
            for encoded in batches:
                _feed(self._pipeline, encoded, np.arange(len(encoded.rows)), self._job.changes_color)
            self._pipeline.schedule_run()
        except RuntimeError as failure:
            self._failure = failure  # an earlier batch has ended the pipeline: `_collect` will get to it

    def _collect(self) -> torch.Tensor:
        """Wait for the oldest batch under way; float32 (V, B, H, W, 3)."""
        while True:
            try:
                if self._failure:
                    raise self._failure
                return collect(self._pipeline, self._job.device)
            except RuntimeError:
                if not any(self._repair(encoded) for encoded in self._under_way):
                    raise
                self._start()

    def _repair(self, encoded: _Encoded) -> bool:
        """Replace the images of a batch that DALI fails on; say whether there were any."""
        known = encoded.converted | encoded.failures.keys()
        culprits = self._find_culprits(encoded, [i for i in range(len(encoded.rows)) if i not in known])
        for index in culprits:
            row = int(encoded.rows[index])
            self._for_pillow.add(row)
            try:
                encoded.images[index] = self._convert(row, encoded.images[index])
                encoded.orientations[index] = UPRIGHT
                encoded.converted.add(index)
                logger.info("DALI cannot decode %s, Pillow can", self._job.manifest.name(row))
            except CorruptImage as corrupt:
                encoded.mark_corrupt(index, str(corrupt))
        return bool(culprits)

    def _find_culprits(self, encoded: _Encoded, indices: list[int]) -> list[int]:
        """Those of the images that DALI fails on.

        Each trial takes a pipeline of its own, as a failure ends it. So those that Pillow refuses are tried first, one
        by one; only where DALI takes all of these is what fails halved until single images are left.
        """
        if self._takes(encoded, indices):
            return []
        with ThreadPoolExecutor(self._job.threads) as threads:
            refused = list(threads.map(lambda index: self._pillow_refuses(encoded, index), indices))
        suspects = [index for index, is_refused in zip(indices, refused, strict=True) if is_refused]
        culprits = [index for index in suspects if not self._takes(encoded, [index])]
        return culprits or self._bisect(encoded, indices)

    def _bisect(self, encoded: _Encoded, indices: list[int]) -> list[int]:
        """Those of images some of which DALI fails on that it fails on alone."""
        if len(indices) == 1:
            return indices
        middle = len(indices) // 2
        halves = (indices[:middle], indices[middle:])
        return [i for half in halves if not self._takes(encoded, half) for i in self._bisect(encoded, half)]

    def _takes(self, encoded: _Encoded, indices: list[int]) -> bool:
        """Whether DALI decodes these images of a batch."""
        if not indices:
            return True
        pipeline = self._build(len(indices), depth=1)
        try:
            _feed(pipeline, encoded, np.array(indices), self._job.changes_color)
            pipeline.run()
        except RuntimeError:
            return False
        return True

    def _pillow_refuses(self, encoded: _Encoded, index: int) -> bool:
        try:
            self._reader.decode(int(encoded.rows[index]), encoded.images[index])
        except CorruptImage:
            return True
        return False

    def _build(self, batch_size: int, depth: int) -> Pipeline:
        job = self._job
        device_id = job.device.index if job.device.type == "cuda" else None
        pipeline = Pipeline(
            batch_size=batch_size, num_threads=job.threads, device_id=device_id, prefetch_queue_depth=depth
        )
        with pipeline:
            pipeline.set_outputs(*_graph(job, "cpu" if device_id is None else "mixed"))
        pipeline.build()
        return pipeline


def _graph(job: LoaderJob, decoder: Literal["cpu", "mixed"]) -> list[Any]:
    """Encoded images and view parameters in, one normalised (H, W, 3) image per view out."""
    encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
    decoding: dict[str, Any] = {
        "device": decoder,
        "output_type": types.RGB,
        "adjust_orientation": False,  # `turn_squares` does it, to the small square that is left of an image
        "jpeg_fancy_upsampling": True,  # as Pillow does
    }
    absolute: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    decoded = fn.decoders.image(encoded, **decoding) if job.views > 1 else None
    outputs = []
    for view in range(job.views):
        anchor = fn.external_source(name=f"anchor{view}", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name=f"shape{view}", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0)
        if decoded is None:
            image = fn.decoders.image_slice(encoded, anchor, shape, **absolute, **decoding)
        else:
            image = fn.slice(decoded, anchor, shape, **absolute)
        image = fn.resize(image, size=(job.side, job.side), interp_type=types.INTERP_LINEAR, antialias=True)
        if job.changes_color:
            factors = {
                name: fn.external_source(name=f"{name}{view}", dtype=types.FLOAT, ndim=0) for name in _COLORS
            }
            # Rounding to bytes in color_twist would take it longer than all else it does.
            image = math.clamp(fn.color_twist(image, dtype=types.FLOAT, **factors), 0, 255)
        image = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            mean=[255 * value for value in job.augmentation.mean],
            std=[255 * value for value in job.augmentation.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        outputs.append(image)
    return outputs


def _feed(pipeline: Pipeline, encoded: _Encoded, indices: npt.NDArray[np.int64], changes_color: bool) -> None:
    """Give a pipeline the chosen images of a batch and their parameters."""
    pipeline.feed_input("images", [np.frombuffer(encoded.images[i], np.uint8) for i in indices])
    views = views_as_stored(encoded.views, encoded.orientations, encoded.sizes)
    for view in range(views.top.shape[1]):
        parameters: dict[str, npt.NDArray[Any]] = {
            "anchor": np.stack([views.top[:, view], views.left[:, view]], axis=1),
            "shape": np.stack([views.height[:, view], views.width[:, view]], axis=1),
            "flip": views.flip[:, view].astype(np.int32),
        }
        if changes_color:
            parameters |= {name: getattr(views, name)[:, view] for name in _COLORS}
        for name, values in parameters.items():
            pipeline.feed_input(f"{name}{view}", np.ascontiguousarray(values[indices]))


def collect(pipeline: Pipeline, device: torch.device) -> torch.Tensor:
    """Wait for a pipeline's next outputs; float32 (V, B, H, W, 3), on the CPU without a copy if there is one view.

    On a GPU DALI uses the memory of an output again as soon as nobody refers to it, in the order of its own stream,
    which waits for none of torch's: the copy has to be done by then.
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)  # the loader's own
        outputs = [from_dlpack(output.as_tensor()) for output in pipeline.outputs(cuda_stream=stream)]
        images = outputs[0].new_empty(len(outputs), *outputs[0].shape)
        for copy, output in zip(images, outputs, strict=True):
            copy.copy_(output)
        stream.synchronize()
        return images
    views = [from_dlpack(output.as_tensor()) for output in pipeline.outputs()]
    if len(views) == 1:
        return views[0][None]
    # Not torch.stack: on the CPU its threads would wait for each other, and for cores that are busy decoding.
    return torch.from_numpy(np.stack([view.numpy() for view in views]))
