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
    FRAMES,
    JPEG,
    PNG,
    START_OF_SCAN,
    jpeg_later_segments,
    jpeg_segments,
    png_chunks,
)

# What cannot be parsed is no error: Pillow is asked then.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
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
_PROGRESSIVE = 0xC2
_COEFFICIENTS = 64  # of a block of 8 x 8 pixels
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
    header = list(jpeg_segments(data))
    frames = [(marker, data[start:stop]) for marker, start, stop in header if marker in FRAMES]
    if _JPEG_END not in data[-_END_WITHIN:] or not frames or header[-1][0] != START_OF_SCAN:
        return False
    later = jpeg_later_segments(data, header[-1][2])
    (coding, frame), *others = frames
    if later is None or others or coding not in _HUFFMAN_FRAMES or len(frame) < 6:
        return False
    scans = [data[start:stop] for marker, start, stop in (header[-1], *later) if marker == START_OF_SCAN]
    return coding != _PROGRESSIVE or _hold_all(scans, components=frame[5])


def _hold_all(scans: list[bytes], *, components: int) -> bool:
    """Whether the scans of a progressive JPEG bring all coefficients to their last bit.

    Where some are missing, libjpeg guesses them, each version in its own way.
    """
    complete: dict[int, int] = {}  # component -> bits of its coefficients
    for scan in scans:
        if not scan or len(scan) != 4 + 2 * scan[0]:
            return False
        first, last, bits_left = scan[-3], scan[-2], scan[-1] & 15
        if bits_left == 0 and last < _COEFFICIENTS:
            for component in scan[1:-3:2]:
                complete[component] = complete.get(component, 0) | ((1 << last + 1) - (1 << first))
    return len(complete) == components and all(bits == (1 << _COEFFICIENTS) - 1 for bits in complete.values())


def _is_whole_png(data: bytes) -> bool:
    """Whether a PNG has an end, is not animated, and what comes before its pixels is not damaged."""
    pixels = False
    for kind, start, stop in png_chunks(data):
        if kind == b"IDAT":
            pixels = True
        elif kind == b"IEND":
            return pixels
        elif kind == b"acTL" or (
            not pixels and crc32(data[start - 4 : stop]) != int.from_bytes(data[stop : stop + 4])
        ):
            return False
    return False
