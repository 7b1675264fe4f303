"""The parts that JPEG and PNG files are made of, found without decoding any of them."""

from __future__ import annotations

from collections.abc import Iterator

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
APP1, START_OF_SCAN, DAMAGED = 0xE1, 0xDA, 0
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # starts of frame: size and kind of the coding
_END_OF_IMAGE = 0xD9
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


def png_chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the chunks of a PNG that lie in `head` whole, checksum included."""
    position, end = len(PNG), len(head)
    while position + 12 <= end:
        start = position + 8
        stop = start + int.from_bytes(head[position : position + 4])
        if stop + 4 > end:
            return
        yield head[position + 4 : start], start, stop
        position = stop + 4
