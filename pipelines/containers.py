"""The parts that JPEG and PNG files are made of, found without decoding any of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
FIRST_CHUNK = 33  # where the chunk after the header of a PNG begins
APP1, START_OF_SCAN, DAMAGED = 0xE1, 0xDA, 0
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # starts of frame: size and kind of the coding
_END_OF_IMAGE = 0xD9
# Tables, comments, the next scan.
_BETWEEN_SCANS = frozenset((0xC4, START_OF_SCAN, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))


def jpeg_segments(head: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, stop) of the segments of a JPEG's header that lie in `head` whole.

    `start` and `stop` bound the content, without marker and length. The last one is `START_OF_SCAN`, or `DAMAGED`
    where there is no marker or the image ends; if neither comes, `head` is too short.
    """
    position, end = 2, len(head)
    while position + 4 <= end:
        marker = head[position + 1]
        if head[position] != 0xFF or marker == _END_OF_IMAGE or marker == 0:
            yield DAMAGED, position, position
            return
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        start, position = position + 4, position + 2 + (head[position + 2] << 8 | head[position + 3])
        if position > end:
            return
        yield marker, start, position
        if marker == START_OF_SCAN:
            return


def jpeg_later_segments(data: bytes, scan: int) -> list[tuple[int, int, int]] | None:
    """Find what follows the first scan of a JPEG.

    Args:
        data: The whole file.
        scan: Where the first scan's pixels begin.

    Returns:
        (marker, start, stop) of each segment, None if a marker is out of place or there is no end. libjpeg
        continues after many such markers and gives up at others, and a decoder of a part of the image may never
        reach them.
    """
    content = np.frombuffer(data, np.uint8)
    positions = scan + np.flatnonzero(content[scan:-1] == 0xFF)
    markers = content[positions + 1]
    positions = positions[(markers != 0) & ((markers < 0xD0) | (markers > 0xD7)) & (markers != 0xFF)]
    found: list[tuple[int, int, int]] = []
    while (following := int(np.searchsorted(positions, scan))) < len(positions):
        position = int(positions[following])
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return found
        if marker not in _BETWEEN_SCANS:
            return None
        scan = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        found.append((marker, position + 4, scan))
    return None


def png_chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the chunks of a PNG that lie in `head` whole, checksum included.

    Pixels (`IDAT`) are yielded as soon as their chunk begins: a search for what comes before them need not read on.
    """
    start, end = len(PNG) + 8, len(head)
    while start + 4 <= end:
        kind, stop = head[start - 4 : start], start + int.from_bytes(head[start - 8 : start - 4])
        if stop + 4 > end and kind != b"IDAT":
            return
        yield kind, start, stop
        start = stop + 12
