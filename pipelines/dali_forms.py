"""What DALI may be given: forms that it decodes as Pillow does, and of those what it can parse.

A file that DALI cannot parse, or that is smaller than the crop asked for, ends the process: DALI's threads are at work
on the rest of the batch when its main thread throws. Each image is therefore parsed by itself first, by the parser
that DALI uses, and none of a form for which equality with Pillow is not proven by a test goes to DALI. Pillow decodes
those, and DALI gets their pixels.
"""

from __future__ import annotations

import os
from zlib import crc32

from pipelines.containers import (
    DAMAGED,
    FRAMES,
    JPEG,
    PNG,
    START_OF_SCAN,
    jpeg_is_in_order,
    jpeg_segments,
    png_chunks,
)

os.environ.setdefault(
    "PYNVIMGCODEC_VERBOSITY", "0"
)  # what cannot be parsed is no error: Pillow is asked then
from nvidia import nvimgcodec

# (codec, channels); all with 8 bits per sample.
_FORMS = frozenset(
    [
        *(("jpeg", channels) for channels in (1, 3)),
        *(("png", channels) for channels in (1, 2, 3, 4)),
        *(("webp", channels) for channels in (3, 4)),
    ]
)
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
_JPEG_END = b"\xff\xd9"
_END_WITHIN = 32  # bytes; some writers pad a file


def may_go_to_dali(data: bytes, height: int, width: int) -> bool:
    """Say whether DALI decodes an image as `decode_rgb` does, as stored, or fails in a way that ends no process.

    Takes some microseconds.

    Args:
        data: The encoded image.
        height: Its height in pixels as stored, according to the manifest.
        width: Its width.
    """
    if data.startswith(JPEG):
        known = _is_usual_jpeg(data)
    elif data.startswith(PNG):
        known = _is_whole_png(data)
    else:
        known = data[:4] == b"RIFF" and data[12:16] != b"VP8X"  # extended WebP may be animated
    if not known:
        return False
    try:
        stream = nvimgcodec.CodeStream(data)
        return (
            (stream.codec_name, stream.num_channels) in _FORMS
            and stream.precision == 8
            and (stream.height, stream.width) == (height, width)
        )
    except RuntimeError:
        return False


def _is_usual_jpeg(data: bytes) -> bool:
    """Whether a JPEG looks whole, and is coded in a way that is tested."""
    marker, stop = DAMAGED, 0
    for marker, _, stop in jpeg_segments(data):  # noqa: B007  the last ones count
        if marker in FRAMES and marker not in _HUFFMAN_FRAMES:
            return False
    return marker == START_OF_SCAN and _JPEG_END in data[-_END_WITHIN:] and jpeg_is_in_order(data, stop)


def _is_whole_png(data: bytes) -> bool:
    """Whether a PNG has an end, is not animated, and what comes before its pixels is not damaged."""
    before_pixels = True
    for kind, start, stop in png_chunks(data):
        before_pixels = before_pixels and kind != b"IDAT"
        if kind == b"acTL":
            return False
        if before_pixels and crc32(data[start - 4 : stop]) != int.from_bytes(data[stop : stop + 4]):
            return False
        if kind == b"IEND":
            return True
    return False
