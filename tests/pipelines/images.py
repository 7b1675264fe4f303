"""Images to test with, manifests of them, and a short way to run a loader."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.augment import Augmentation
from pipelines.loader import Batch, Loader, LoaderConfig, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.strings import StringTable

BACKENDS = ("dali", "host")


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colors with some edges, different for each seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    frequency, phase = generator.uniform(1, 5, (2, 3, 1, 1)), generator.uniform(0, 6, (3, 1, 1))
    pixels = 128 + 90 * np.sin(frequency[0] * x + frequency[1] * y + phase)
    pixels[:, height // 3 : height // 2, width // 4 : width // 2] = generator.uniform(0, 255, (3, 1, 1))
    return Image.fromarray(pixels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(root: Path, images: list[bytes], sizes: list[tuple[int, int]]) -> Manifest:
    """Write image files and return their manifest with the given (height, width) of each."""
    names = [f"{index:04}" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (root / name).write_bytes(image)
    count = len(images)
    heights, widths = np.array(sizes, np.int32).T
    return Manifest(
        root=root,
        sources=StringTable.of(names),
        keys=StringTable.of(names),
        source_index=np.arange(count),
        offsets=np.zeros(count, np.int64),
        sizes=np.array([len(image) for image in images]),
        heights=heights,
        widths=widths,
        labels=np.full(count, -1, np.int32),
    )


def photos(root: Path, count: int, kind: str = "PNG") -> Manifest:
    """`count` photos of different sizes."""
    sizes = [(40 + 7 * index % 31, 36 + 11 * index % 43) for index in range(count)]
    images = [encode(photo(*size, seed), kind) for seed, size in enumerate(sizes)]
    return write_images(root, images, sizes)


def open_any(manifest: Manifest, requests: Iterable[Request], backend: str, **options: Any) -> Loader:
    """`open_loader` with arguments most tests do not care about."""
    config = {name: options.pop(name) for name in ("threads", "prefetch") if name in options}
    defaults: dict[str, Any] = {
        "augmentation": Augmentation(image_size=32),
        "training": True,
        "views": 1,
        "seed": 0,
        "device": torch.device("cpu"),
        "config": LoaderConfig(backend=backend, **config),  # type: ignore[arg-type]
        "on_corrupt": fail,
    }
    return open_loader(manifest, requests, **(defaults | options))


def load(manifest: Manifest, requests: Iterable[Request], backend: str, **options: Any) -> list[Batch]:
    with open_any(manifest, requests, backend, **options) as loader:
        return list(loader)


def in_order(count: int, batch: int, epochs: int = 1) -> list[Request]:
    """Requests for the rows 0, 1, 2, … in batches, the last of which may be smaller."""
    starts = range(0, count, batch)
    return [
        Request(epoch, np.arange(start, min(start + batch, count)))
        for epoch in range(epochs)
        for start in starts
    ]


def pixels(batch: Batch, augmentation: Augmentation) -> torch.Tensor:
    """Undo the normalization: (V, B, 3, H, W) in [0, 255]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (augmentation.mean, augmentation.std))
    return (batch.images * std + mean) * 255


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Whether two streams of batches are bit for bit the same."""
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.instance_ids, b.instance_ids)
        for a, b in zip(one, other, strict=True)
    )


def fail(row: int, name: str, reason: str) -> None:
    raise AssertionError(f"image {name} (row {row}) was reported: {reason}")


def collector(found: list[tuple[int, str, str]]) -> Callable[[int, str, str], None]:
    return lambda row, name, reason: found.append((row, name, reason))
