"""Image sizes from the first bytes of a file, without decoding it."""

import io
from collections.abc import Callable

from PIL import Image

# Lower case, matched without regard to case.
EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
# Named, because Pillow would otherwise also try formats that start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Nearly all headers lie in the first page; photographs with long EXIF or ICC segments need more.
_HEAD_BYTES = (4096, 65536, 1 << 20)
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_NOT_FRAMES = frozenset((0xC4, 0xC8, 0xCC))  # between the start-of-frame markers C0 to CF
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
# No more than Pillow accepts by default: decoded, such an image takes half a gigabyte.
MAX_PIXELS = 178_956_970
# Pillow's own limit would bind the loader without DALI only, and comes with a warning from half of it on.
Image.MAX_IMAGE_PIXELS = None
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


class HeaderError(ValueError):
    """The bytes are not the start of an image; the message is the reason, fit to follow a file's name."""


def image_size(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Height and width in pixels as stored, EXIF orientation not applied.

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
        if head.startswith(_PNG):
            found = _png_size(head)
        elif head.startswith(_JPEG):
            found = _jpeg_size(head)
        else:
            found = _pillow_size(read(size))
        if found:
            height, width = found
            if height <= 0 or width <= 0:
                raise HeaderError(f"header says {height} x {width} pixels")
            if height * width > MAX_PIXELS:
                raise HeaderError(
                    f"too large: {height} x {width} pixels, the most are {MAX_PIXELS:,}; scale or cut it"
                )
            return height, width
        if count >= size:
            break
    raise HeaderError(f"cut short: its {size} bytes end inside the header")


def _png_size(head: bytes) -> tuple[int, int] | None:
    """None if `head` is too short."""
    if len(head) < 33:  # signature and the whole IHDR chunk
        return None
    if head[12:16] != b"IHDR":
        raise HeaderError("not an image: PNG signature without a header chunk")
    return int.from_bytes(head[20:24]), int.from_bytes(head[16:20])


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Walk the segments up to the start of frame; None if `head` is too short."""
    position = 2
    while position + 9 <= len(head):
        if head[position] != 0xFF:
            raise HeaderError(f"not an image: JPEG without a marker at byte {position}")
        marker = head[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            height, width = head[position + 5 : position + 7], head[position + 7 : position + 9]
            return int.from_bytes(height), int.from_bytes(width)
        elif marker in (_START_OF_SCAN, _END_OF_IMAGE):
            raise HeaderError("not an image: JPEG without a start of frame")
        else:
            position += 2 + int.from_bytes(head[position + 2 : position + 4])
    return None


def _pillow_size(content: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # Pillow's readers let through whatever damaged bytes make them raise
        raise HeaderError(f"not an image: {len(content)} bytes, the first are {content[:8]!r}") from error
