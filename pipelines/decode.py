"""Encoded bytes to RGB pixels with Pillow: the judge of what is an image, and the reference for DALI."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.headers import FORMATS

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND"
_END_WITHIN = 32  # bytes; some writers pad a file
_BMP, _TIFF, _PNM = (b"BM",), (b"II*\0", b"MM\0*"), (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


class CorruptImage(Exception):  # noqa: N818  a finding about the data that the loaders handle, not a failure
    """The bytes are not the image that the manifest promises; the message says why."""


def decode_rgb(data: bytes, height: int, width: int) -> Image.Image:
    """Decode an image of any mode that Pillow knows to 8-bit RGB.

    16-bit greys are scaled to 8 bits, transparency is dropped, the first frame is taken, and an EXIF orientation
    is ignored, since the manifest holds sizes as stored.

    Args:
        data: The encoded image.
        height: Its height in pixels according to the manifest.
        width: Its width.

    Raises:
        CorruptImage: If it cannot be decoded or has another size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != (width, height):
                raise CorruptImage(
                    f"is {image.height} x {image.width} pixels, the manifest says {height} x {width}: build it again"
                )
            if image.mode in _SIXTEEN_BITS:
                pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
                return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
            image.load()
            image.info.pop("transparency", None)  # else Pillow warns that it is lost
            return image.convert("RGB")
    except (CorruptImage, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise CorruptImage(str(error) or type(error).__name__) from error


def needs_pillow(data: bytes) -> bool:
    """Say whether DALI should not be given these bytes: it may not know the format, or they look cut short.

    A cheap look at both ends. DALI decodes all else as `decode_rgb` does, or fails.
    """
    if data.startswith(_JPEG):
        return _JPEG_END not in data[-_END_WITHIN:]
    if data.startswith(_PNG):
        return _PNG_END not in data[-_END_WITHIN:]
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    return not (webp or data.startswith(_BMP + _TIFF + _PNM))


def encode_pnm(image: Image.Image) -> bytes:
    """Wrap the pixels of an RGB image in the simplest format there is (PPM)."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
