"""Encoded bytes to RGB pixels with Pillow: the judge of what is an image, and the reference for DALI.

What the pixels of a form mean is decided here and nowhere else; `docs/images.md` says it in words.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile

from pipelines.exif import TURNS, UPRIGHT
from pipelines.kinds import open_image, turn_of

# Grays of more than 8 bits per pixel: 16-bit integers, 32-bit integers, floats.
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# White of 8, 10, 12, 14 and 16 bits: cameras and scanners store their own depth in 16 bits without saying so.
_WHITES = (255, 1023, 4095, 16383, 65535)
_LEAST_SPAN = 1 / 16
_OTHER_ENDIAN = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
_GREY_ALPHA = "LA;16B"
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_FEW_HIGH_BYTES = 64  # below, samples have 14 bits at most
CONTRAST = 8  # levels of 255; an image that spans fewer is nearly constant

Numbers = npt.NDArray[np.integer[Any]] | npt.NDArray[np.floating[Any]]


class CorruptImage(Exception):  # noqa: N818  a finding about the data that the loaders handle, not a failure
    """The bytes are not the image that the manifest promises; the message says why."""


def decode_rgb(data: bytes, height: int, width: int, *, upright: bool = True) -> Image.Image:
    """Decode an image of any mode that Pillow knows to 8-bit RGB.

    Samples of more than 8 bits are brought to 8 by `to_bytes`, transparency is dropped, of several frames or pages
    the first one is taken, CMYK and Lab become sRGB (color profiles are ignored), and the image is turned as its
    EXIF orientation says.

    Args:
        data: The encoded image.
        height: Its height in pixels according to the manifest.
        width: Its width.
        upright: False for manifests of schema 1, whose sizes are those before turning (except of TIFFs).

    Raises:
        CorruptImage: If it cannot be decoded or has another size.
    """
    try:
        with open_image(data) as image:
            turn = turn_of(image, data) if upright else UPRIGHT
            found = image.size[::-1] if TURNS[turn].swap else image.size
            if found != (width, height):
                raise CorruptImage(
                    f"is {found[1]} x {found[0]} pixels, the manifest says {height} x {width}: build it again"
                )
            # Pillow turns TIFFs while loading, and looks for an orientation in XMP which it had not at opening.
            image.info.pop("xmp", None)
            decoded = turned(_to_rgb(image, data), turn)
        if decoded.size != (width, height):
            raise CorruptImage(
                f"changed its size while decoding to {decoded.height} x {decoded.width} pixels"
            )
        return decoded
    except (CorruptImage, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise CorruptImage(str(error) or type(error).__name__) from error


def to_bytes(values: Numbers, *, white: int | None = None) -> npt.NDArray[np.uint8]:
    """Bring samples of more than 8 bits to 8: the range rule.

    Black is 0, and white the least of 1 (floats only), 255, 1023, 4095, 16383 and 65535 that no sample exceeds. If
    samples are negative or larger, or fill less than a sixteenth of that range, black is the smallest and white the
    largest of the image. What is not finite counts as 0, or as the largest or smallest where it is infinite.

    Args:
        values: Samples of any shape.
        white: The largest sample that there can be, where the file declares it.
    """
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    low, high = float(finite.min()), float(finite.max())
    whites = (white,) if white else (1, *_WHITES) if values.dtype.kind == "f" else _WHITES
    fitting = next((candidate for candidate in whites if high <= candidate), None)
    if low >= 0 and fitting and (white or low == high or high - low >= _LEAST_SPAN * fitting):
        low, high = 0.0, float(fitting)
    if values.dtype.kind == "u" and values.itemsize == 2:  # by a table, as there are many such and large ones
        return _scale(np.arange(1 << 16), low, high)[values]
    return _scale(values, low, high)


def _scale(values: Numbers, low: float, high: float) -> npt.NDArray[np.uint8]:
    scaled = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=high, neginf=low)
    scaled = (scaled - low) * (255 / (high - low or 1))
    return np.asarray((scaled + 0.5).clip(0, 255).astype(np.uint8))


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image of an EXIF orientation, 1 to 8, upright."""
    turn = TURNS[orientation]
    for wanted, transpose in (
        (turn.swap, Image.Transpose.TRANSPOSE),
        (turn.flip_rows, Image.Transpose.FLIP_TOP_BOTTOM),
        (turn.flip_columns, Image.Transpose.FLIP_LEFT_RIGHT),
    ):
        if wanted:
            image = image.transpose(transpose)
    return image


def nearly_constant(image: Image.Image) -> bool:
    """Whether an RGB image has next to no contrast: no channel spans 8 levels of 255."""
    extrema: Any = image.getextrema()
    return all(high - low < CONTRAST for low, high in extrema)


def encode_pnm(image: Image.Image) -> bytes:
    """Wrap the pixels of an RGB image in the simplest format there is (PPM)."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def _to_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode what Pillow has opened, as stored."""
    tags: Any = getattr(image, "tag_v2", {})
    white_is_zero = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    unsigned = tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,)
    declared = 65535 if image.format == "PPM" and image.mode != "F" else None  # Pillow has scaled to it
    if tags.get(_PLANAR) == 2 and tags.get(_BITS, ())[:1] == (16,):
        image.tile = [
            _of_one_channel(tile, ";16L" if tags.prefix == b"II" else ";16B") for tile in image.tile
        ]
    tiles = list(image.tile)
    image.load()
    if image.mode in _WIDE:
        values = np.asarray(image)
        gray = to_bytes(values.view(np.uint32) if unsigned and image.mode == "I" else values, white=declared)
        return Image.fromarray(255 - gray if white_is_zero else gray).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    is_deep = tiles and ";16" in _rawmode(tiles[0])
    decoded = _low_bytes_too(image, data, tiles) if is_deep else image
    decoded.info.pop("transparency", None)  # else Pillow warns that it is lost
    if decoded.mode == "La":
        decoded = decoded.convert("LA")  # there is no direct way
    return decoded.convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # only where it works in place
    return converted


def _low_bytes_too(image: Image.Image, data: bytes, tiles: list[Any]) -> Image.Image:
    """Apply the range rule to channels of 16 bits, of which Pillow has kept the high bytes in `image`.

    The high bytes alone are right where they use the range. Where they do not, as in 12 bits stored in 16, the
    image is decoded once more with the bytes swapped, which yields the low ones.
    """
    rawmodes = {_rawmode(tile) for tile in tiles}
    high = np.asarray(image)[..., :3] if image.mode == "RGBA" else np.asarray(image)
    fills_range = high.max() >= _FEW_HIGH_BYTES and int(high.max()) - int(high.min()) > 256 * _LEAST_SPAN
    known = all(mode[-4:] in _OTHER_ENDIAN and not mode.startswith("RGBa") for mode in rawmodes)
    if fills_range or not known:
        return image
    with open_image(data) as again:
        again.info.pop("xmp", None)
        again.tile = [_with_swapped_bytes(tile) for tile in tiles]
        low = np.asarray(again)
    if rawmodes == {_GREY_ALPHA}:
        low = low[..., 1:2]
    values = high.astype(np.uint16) << 8 | low[..., : high.shape[2]]
    return Image.frombytes("CMYK" if image.mode == "CMYK" else "RGB", image.size, to_bytes(values).tobytes())


def _of_one_channel(tile: Any, suffix: str) -> Any:
    """Of channels stored one after the other Pillow forgets that they have 16 bits, where they are not compressed."""
    rawmode = _rawmode(tile)
    return tile._replace(args=(rawmode + suffix, *tile.args[1:])) if len(rawmode) == 1 else tile


def _rawmode(tile: Any) -> str:
    return str(tile.args if isinstance(tile.args, str) else tile.args[0])


def _with_swapped_bytes(tile: Any) -> Any:
    rawmode = _rawmode(tile)
    # Gray with alpha has no other order, but can be taken for four channels: high, low, high, low.
    swapped = "RGBA" if rawmode == _GREY_ALPHA else rawmode[:-4] + _OTHER_ENDIAN[rawmode[-4:]]
    return tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
