"""How far the decoders are apart, by form of image: the two loaders, and the decoder of thumbnails."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipelines.augment import Augmentation
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.reader import ImageReader
from tests.pipelines.images import load, pixels

RANDOM_VIEWS = 20
_COLORLESS = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale_probability": 0.0}
_BATCH = 32


class Apart(NamedTuple):
    """Differences in levels of 255, each where it is largest: of all pairs of decoders and all views."""

    mean: float
    quantile: float
    """The 99.9th percentile."""


def compare(manifest: Manifest, names: Sequence[str]) -> dict[str, Apart]:
    """DALI, the host loader and thumbnails on whole images; the loaders on random views at 32 and 224 pixels.

    Args:
        manifest: Images of one size.
        names: What to call its rows.
    """
    found = dict.fromkeys(names, Apart(0, 0))
    for start in range(0, len(names), _BATCH):
        request = Request(0, np.arange(start, min(start + _BATCH, len(names))))
        for one, other in _pairs(manifest, request):
            for index, row in enumerate(request.rows.tolist()):
                earlier = found[names[row]]
                for view in (one[:, index] - other[:, index]).abs():
                    last = view.flatten().kthvalue(int(np.ceil(0.999 * view.numel()))).values
                    earlier = Apart(max(earlier.mean, float(view.mean())), max(earlier.quantile, float(last)))
                found[names[row]] = earlier
    return found


def _pairs(manifest: Manifest, request: Request) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels (V, B, 3, S, S) of two decoders."""
    side = int(min(manifest.heights.min(), manifest.widths.min()))
    dali, host = (_loaded(manifest, request, backend, side, training=False) for backend in ("dali", "host"))
    reader = ImageReader(manifest)
    images = [np.asarray(reader.decode(row), np.float32) for row in request.rows.tolist()]
    reader.close()
    top, left = (images[0].shape[0] - side) // 2, (images[0].shape[1] - side) // 2
    middle = torch.from_numpy(np.stack(images)[None, :, top : top + side, left : left + side])
    thumbnails = middle.permute(0, 1, 4, 2, 3)
    yield from ((dali, host), (dali, thumbnails), (host, thumbnails))
    for side in (32, 224):
        yield tuple(_loaded(manifest, request, backend, side, training=True) for backend in ("dali", "host"))  # type: ignore[misc]


def _loaded(manifest: Manifest, request: Request, backend: str, side: int, *, training: bool) -> torch.Tensor:
    augmentation = Augmentation(image_size=side, **_COLORLESS)
    views = RANDOM_VIEWS if training else 1
    (batch,) = load(manifest, [request], backend, augmentation=augmentation, training=training, views=views)
    return pixels(batch, augmentation)
