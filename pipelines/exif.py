"""How an image must be turned to be shown as its owner sees it: the orientation in its EXIF data."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pipelines.containers import (
    APP1,
    DAMAGED,
    FIRST_CHUNK,
    JPEG,
    PNG,
    START_OF_SCAN,
    jpeg_segments,
    png_chunks,
)


class Turn(NamedTuple):
    """Steps from an image as stored to the image as shown, in this order."""

    swap: bool
    """Rows become columns."""
    flip_rows: bool
    """Top to bottom."""
    flip_columns: bool
    """Left to right."""


# By EXIF orientation.
TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}
UPRIGHT = 1
ORIENTATION = 0x0112  # the tag

_SHORT = 3  # the type of the tag's value; some writers take a long
_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_EXIF = b"Exif\0\0"
_WEBP_HAS_EXIF = 0x08  # flag of the VP8X chunk


def orientation(head: bytes) -> int | None:
    """Orientation, 1 to 8 (1: upright), of the JPEG, PNG or WebP that `head` is the start of.

    EXIF data counts before the pixels of a JPEG or PNG and anywhere in a WebP. Where there is none, or it is
    damaged, and in all other formats, the answer is 1: Pillow turns TIFFs by itself.

    Returns:
        None if `head` ends before the answer is known; a whole file never gives more.
    """
    if head.startswith(JPEG):
        return _of_jpeg(head)
    if head.startswith(PNG):
        return _of_png(head)
    if (
        head.startswith(b"RIFF")
        and head[8:16] == b"WEBPVP8X"
        and len(head) > 20
        and head[20] & _WEBP_HAS_EXIF
    ):
        return _of_webp(head)
    return UPRIGHT


def _of_jpeg(head: bytes) -> int | None:
    for marker, start, stop in jpeg_segments(head):
        if marker in (START_OF_SCAN, DAMAGED):
            return UPRIGHT
        if marker == APP1 and head.startswith(_EXIF, start):
            return _of_exif(head[start:stop])
    return None


def _of_png(head: bytes) -> int | None:
    if head.startswith(b"IDAT", FIRST_CHUNK + 4):  # nothing but the pixels, the usual case
        return UPRIGHT
    for kind, start, stop in png_chunks(head):
        if kind == b"eXIf":
            return _of_exif(head[start:stop])
        if kind in (b"IDAT", b"IEND"):
            return UPRIGHT
    return None


def _of_webp(head: bytes) -> int | None:
    position = 12
    while position + 8 <= len(head):
        size = int.from_bytes(head[position + 4 : position + 8], "little")
        if head.startswith(b"EXIF", position):
            content = head[position + 8 : position + 8 + size]
            return _of_exif(content) if len(content) == size else None
        position += 8 + size + size % 2
    return None


def _of_exif(content: bytes) -> int:
    """Look the tag up in the first directory of EXIF data, with or without the prefix that JPEG puts before it."""
    content = content.removeprefix(_EXIF)
    order = _ORDERS.get(content[:4])
    if order is None:
        return UPRIGHT
    directory = int.from_bytes(content[4:8], order)
    entries = int.from_bytes(content[directory : directory + 2], order)
    for position in range(directory + 2, min(directory + 2 + 12 * entries, len(content) - 11), 12):
        if int.from_bytes(content[position : position + 2], order) == ORIENTATION:
            width = 2 if int.from_bytes(content[position + 2 : position + 4], order) == _SHORT else 4
            value = int.from_bytes(content[position + 8 : position + 8 + width], order)
            return value if value in TURNS else UPRIGHT
    return UPRIGHT
