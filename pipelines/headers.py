"""Image sizes from the first bytes of a file, without decoding it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from zlib import crc32

from pipelines.containers import DAMAGED, FRAMES, JPEG, PNG, START_OF_SCAN, jpeg_segments
from pipelines.exif import TURNS, orientation
from pipelines.kinds import ExtraMissing, open_image, turn_of

# Nearly all headers lie in the first page; photographs with long EXIF or ICC segments need more.
_HEAD_BYTES = (4096, 65536, 1 << 20)
_SUMMED_BYTES = 4096
# No more than Pillow accepts by default: decoded, such an image takes half a gigabyte.
MAX_PIXELS = 178_956_970


class HeaderError(ValueError):
    """The bytes are not the start of an image; the message is the reason, fit to follow a file's name."""


def image_size(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Height and width in pixels of the picture as shown, its EXIF orientation applied.

    PNG and JPEG are parsed here, the other formats by Pillow.

    Args:
        read: Returns the first n bytes of the file, n at most `size`.
        size: Bytes in the file.

    Raises:
        HeaderError: Empty, not an image, cut short inside the header, or of more than `MAX_PIXELS` pixels.
    """
    if size == 0:
        raise HeaderError("empty (0 bytes)")
    for count in (*_HEAD_BYTES, size):
        head = read(min(count, size))
        if head.startswith(PNG):
            found = _png_size(head)
        elif head.startswith(JPEG):
            found = _jpeg_size(head)
        else:
            return _checked(*_pillow_size(read(size)))
        turn = orientation(head)
        if found and turn:
            return _checked(*(found[::-1] if TURNS[turn].swap else found))
        if count >= size:
            break
    raise HeaderError(f"cut short: its {size} bytes end inside the header")


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    size: int
    height: int
    width: int
    checksum: int


def header_of(read: Callable[[int, int], bytes], size: int) -> Header:
    """The header of an image in a file of `size` bytes; see `image_size` and `checksum`."""
    return Header(size, *image_size(partial(read, 0), size), checksum(read, size))


def checksum(read: Callable[[int, int], bytes], size: int) -> int:
    """CRC-32 of the first, middle and last 4 kB of a file; of all of it if it has no more than these.

    Args:
        read: Returns n bytes from a position on: `read(position, n)`.
        size: Bytes in the file.
    """
    found = 0
    for start, count in summed(size):
        found = crc32(read(start, count), found)
    return found


def summed(size: int) -> list[tuple[int, int]]:
    """Where the bytes lie that `checksum` covers: positions and counts."""
    if size <= 3 * _SUMMED_BYTES:
        return [(0, size)]
    return [(start, _SUMMED_BYTES) for start in (0, (size - _SUMMED_BYTES) // 2, size - _SUMMED_BYTES)]


def _checked(height: int, width: int) -> tuple[int, int]:
    if height <= 0 or width <= 0:
        raise HeaderError(f"header says {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise HeaderError(
            f"too large: {height} x {width} pixels, the most are {MAX_PIXELS:,}; scale or cut it"
        )
    return height, width


def _png_size(head: bytes) -> tuple[int, int] | None:
    """None if `head` is too short."""
    if len(head) < 33:  # signature and the whole IHDR chunk
        return None
    if head[12:16] != b"IHDR":
        raise HeaderError("not an image: PNG signature without a header chunk")
    return int.from_bytes(head[20:24]), int.from_bytes(head[16:20])


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """From the start of frame; None if `head` is too short."""
    for marker, start, stop in jpeg_segments(head):
        if marker in FRAMES and stop - start >= 5:
            return int.from_bytes(head[start + 1 : start + 3]), int.from_bytes(head[start + 3 : start + 5])
        if marker == DAMAGED:
            raise HeaderError(f"not an image: JPEG without a segment at byte {start}")
        if marker == START_OF_SCAN:
            raise HeaderError("not an image: JPEG without a start of frame")
    return None


def _pillow_size(content: bytes) -> tuple[int, int]:
    """As shown."""
    try:
        with open_image(content) as image:
            size = image.height, image.width
            return size[::-1] if TURNS[turn_of(image, content)].swap else size
    except ExtraMissing as missing:
        raise HeaderError(str(missing)) from missing
    except Exception as error:  # Pillow's readers let through whatever damaged bytes make them raise
        raise HeaderError(
            f"not an image, or one of a form that Pillow cannot read: {len(content)} bytes, the first are "
            f"{content[:8]!r}"
        ) from error
