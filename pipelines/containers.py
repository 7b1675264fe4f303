"""The parts that JPEG and PNG files are made of, found without decoding any of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
APP1, START_OF_SCAN, DAMAGED = 0xE1, 0xDA, 0
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # starts of frame: size and kind of the coding
_END_OF_IMAGE = 0xD9
_BETWEEN_SCANS = frozenset(
    (0xC4, START_OF_SCAN, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))
)  # tables, comments, the next scan
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


def jpeg_is_in_order(data: bytes, scan: int) -> bool:
    """Whether the first scan's data, from `scan` on, and what follows it leads to the end of a JPEG.

    libjpeg goes on after many a marker that cannot stand where it stands, and gives up at others. Who decodes only a
    part of the image may not come to see it.
    """
    content = np.frombuffer(data, np.uint8)
    positions = scan + np.flatnonzero(content[scan:-1] == 0xFF)
    markers = content[positions + 1]
    positions = positions[(markers != 0) & ((markers < 0xD0) | (markers > 0xD7)) & (markers != 0xFF)]
    while (following := int(np.searchsorted(positions, scan))) < len(positions):
        position = int(positions[following])
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return True
        if marker not in _BETWEEN_SCANS:
            return False
        scan = position + 2 + int.from_bytes(data[position + 2 : position + 4])
    return False


def png_chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the chunks of a PNG that lie in `head` whole, checksum included.

    Pixels (`IDAT`) are yielded as soon as their chunk begins: a search for what comes before them need not read on.
    """
    position, end = len(PNG), len(head)
    while position + 12 <= end:
        start = position + 8
        stop = start + int.from_bytes(head[position : position + 4])
        kind = head[position + 4 : start]
        if stop + 4 > end and kind != b"IDAT":
            return
        yield kind, start, stop
        position = stop + 4
