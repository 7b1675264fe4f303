"""Encoded images of every kind, and folders and tar files of them."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.manifest import Manifest

HEIGHT, WIDTH = 21, 34


def noise(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(values).convert(mode)


def encode(mode: str, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def long_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    exif[0x010E] = "x" * 60_000
    return exif.tobytes()


ODD = {
    "rgb.png": encode("RGB", "PNG"),
    "gray.png": encode("L", "PNG"),
    "alpha.png": encode("RGBA", "PNG"),
    "palette.png": encode("P", "PNG"),
    "deep.png": encode("I;16", "PNG"),
    "bits.png": encode("1", "PNG"),
    "rgb.jpg": encode("RGB", "JPEG"),
    "gray.jpg": encode("L", "JPEG"),
    "cmyk.jpg": encode("CMYK", "JPEG"),
    "progressive.jpeg": encode(
        "RGB", "JPEG", progressive=True, exif=long_exif(), icc_profile=bytes(200_000), comment=b"a comment"
    ),
    "animated.gif": encode("P", "GIF", save_all=True, append_images=[noise("P"), noise("P")]),
    "lossy.webp": encode("RGB", "WEBP"),
    "alpha.webp": encode("RGBA", "WEBP", lossless=True),
    "rgb.bmp": encode("RGB", "BMP"),
    "gray.tif": encode("L", "TIFF"),
    "rgb.ppm": encode("RGB", "PPM"),
    "wrong-extension.jpg": encode("RGB", "PNG"),
}


def png(height: int = 3, width: int = 5) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root: Path, *names: str, content: bytes | None = None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png() if content is None else content)
    return root


def write_tar(path: Path, members: Mapping[str, bytes], layout: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def content_of(manifest: Manifest, row: int) -> bytes:
    """The bytes of an image, found as a loader finds them: without a tar library."""
    source = manifest.root / manifest.sources[int(manifest.source_index[row])]
    return source.read_bytes()[manifest.offsets[row] : manifest.offsets[row] + manifest.sizes[row]]
