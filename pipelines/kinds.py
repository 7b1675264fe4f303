"""The kinds of image files that are taken, and the one place where Pillow opens encoded images."""

from __future__ import annotations

import importlib
import io
from functools import cache

from PIL import Image, ImageFile

from pipelines.exif import ORIENTATION, TURNS, UPRIGHT, orientation

KINDS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
}
"""By the name that Pillow has for it: the usual endings. What a file holds decides, not which of them it has."""

EXTENSIONS = frozenset(ending for endings in KINDS.values() for ending in endings)
"""Lower case, matched without regard to case."""

# Named, because Pillow would otherwise also try formats that start other programs (EPS).
_FORMATS = tuple(kind for kind in KINDS if kind != "HEIF")  # which Pillow knows once its plugin is loaded
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BRANDS_BYTES = 64

Image.MAX_IMAGE_PIXELS = None  # it would bind the loader without DALI only; `headers.MAX_PIXELS` binds all


class ExtraMissing(Exception):  # noqa: N818  a finding about the installation
    """The image is of a kind that needs a package that is not installed; the message names it."""


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an encoded image with Pillow as one of `KINDS`; nothing is decoded yet.

    Raises:
        ExtraMissing: It is HEIC, and `pillow-heif` is not installed.
        Exception: Whatever Pillow's readers let damaged bytes make them raise.
    """
    image = Image.open(io.BytesIO(data), formats=_heic_formats() if is_heic(data) else _FORMATS)
    assert isinstance(image, ImageFile.ImageFile)
    return image


@cache
def _heic_formats() -> tuple[str]:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ExtraMissing("HEIC needs the extra of that name: pip install 'instdisc[heic]'") from error
    return ("HEIF",)


def turn_of(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8, by which an image is yet to be turned.

    Args:
        image: From `open_image`. Pillow turns TIFFs and HEIC by itself.
        data: What it was opened from.
    """
    if image.format == "AVIF":  # Pillow puts the rotation of the container there
        found = image.getexif().get(ORIENTATION, UPRIGHT)
        return found if found in TURNS else UPRIGHT
    return orientation(data) or UPRIGHT


def is_heic(head: bytes) -> bool:
    """Whether `head` starts an image in the HEIF container that is not AVIF."""
    size = min(int.from_bytes(head[:4]), _BRANDS_BYTES)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS and b"avif" not in head[8:size]
