"""Every form of image that is accepted, encoded here, with what it must look like."""

import io
import struct
import zlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, ImageCms, ImageOps

from tests.pipelines.images import encode, photo

HEIGHT, WIDTH = 61, 83
# Of Adam7, the interlacing of PNG: first row and column, steps between rows and columns.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


class Form(NamedTuple):
    data: bytes
    look: Image.Image
    """RGB, as shown."""
    lossy: bool = False


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: npt.NDArray[Any], *, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """A PNG of uint8 or uint16 (H, W, C), which Pillow can only write in part."""
    bits = 8 * values.itemsize
    passes = [values[y::dy, x::dx] for y, x, dy, dx in _PASSES] if interlaced else [values]
    rows = b"".join(b"\0" + row.astype(f">u{values.itemsize}").tobytes() for part in passes for row in part)
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOR_TYPES[channels], 0, 0, interlaced)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + pixels + chunk(b"IEND", b"")


def tiff(values: npt.NDArray[Any], photometric: int, *, big: bool = False, planar: bool = False) -> bytes:
    """An uncompressed TIFF of samples (H, W, C) of any type, in strips of 16 rows."""
    order = ">" if big else "<"
    height, width, channels = values.shape
    typed = values.astype(values.dtype.newbyteorder(order))
    planes = [typed[..., [channel]] for channel in range(channels)] if planar else [typed]
    strips = [plane[start : start + 16].tobytes() for plane in planes for start in range(0, height, 16)]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    lengths = [len(strip) for strip in strips]
    offsets = np.cumsum([8, *lengths])
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8 * values.itemsize] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, offsets[:-1].tolist()),
        277: (3, [channels]),
        278: (4, [16]),
        279: (4, lengths),
        284: (3, [2 if planar else 1]),
        339: (3, [kind] * channels),
    }
    start = int(offsets[-1])
    extra, entries = b"", b""
    for tag, (code, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{'H' if code == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + 2 + 12 * len(tags) + 4 + len(extra))
            extra += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, code, len(numbers)) + place
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return head + b"".join(strips) + directory + extra


def bmp(image: Image.Image, bits: int) -> bytes:
    """A BMP of 16 bits per pixel (5 for each color), or one of 8 that is run-length encoded."""
    width, height = image.size
    if bits == 16:
        values = np.asarray(image).astype(np.uint16) >> 3
        packed = values[..., 0] << 10 | values[..., 1] << 5 | values[..., 2]
        stride = (2 * width + 3) // 4 * 4
        pixels = b"".join(row.astype("<u2").tobytes().ljust(stride, b"\0") for row in packed[::-1])
        palette, compression = b"", 0
    else:
        palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
        rows = np.asarray(image)[::-1]
        pixels = b"".join(b"".join(bytes([1, level]) for level in row) + b"\0\0" for row in rows) + b"\0\1"
        compression = 1
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels


def oriented(orientation: int, *, big: bool = True) -> bytes:
    """EXIF data, as Pillow takes it."""
    exif = Image.Exif()
    exif.endian = ">" if big else "<"
    exif[0x0112] = orientation
    return exif.tobytes()


def as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """What a camera stores that is held so that its picture must be turned to look like `image`."""
    for candidate in Image.Transpose:
        stored = image.transpose(candidate)
        stored.getexif()[0x0112] = orientation
        if np.array_equal(ImageOps.exif_transpose(stored), image):
            stored.getexif().clear()
            return stored
    return image


@cache
def forms() -> dict[str, Form]:
    """By name; all of one size as shown."""
    image = photo(HEIGHT, WIDTH)
    return _jpegs(image) | _pngs(image) | _webps(image) | _tiffs(image) | _others(image)


def _with_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The image in colors and in gray, both half transparent."""
    alpha = photo(HEIGHT, WIDTH, 1).convert("L")
    return Image.merge("RGBA", (*image.split(), alpha)), Image.merge("LA", (image.convert("L"), alpha))


def _opaque(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    return np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)


def _frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [photo(HEIGHT, WIDTH, seed) for seed in (2, 3)]}


def _form(data: bytes, look: Image.Image, lossy: bool = False) -> Form:
    return Form(data, look.convert("RGB"), lossy)


def _jpegs(image: Image.Image) -> dict[str, Form]:
    gray, cmyk = image.convert("L"), image.convert("CMYK")
    options: dict[str, dict[str, Any]] = {
        **{
            f"jpeg {sampling}": {"subsampling": sampling} for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        },
        "progressive jpeg": {"progressive": True},
        "rgb jpeg": {"keep_rgb": True},
        "jpeg with restarts": {"restart_marker_blocks": 3},
        "jpeg with little-endian exif": {"exif": oriented(1, big=False)},
    }
    found = {
        name: _form(encode(image, "JPEG", quality=95, **each), image, lossy=True)
        for name, each in options.items()
    }
    found["gray jpeg"] = _form(encode(gray, "JPEG", quality=95), gray, lossy=True)
    found["progressive gray jpeg"] = _form(
        encode(gray, "JPEG", quality=95, progressive=True), gray, lossy=True
    )
    found["cmyk jpeg"] = _form(encode(cmyk, "JPEG", quality=95), cmyk, lossy=True)
    for number in range(2, 9):
        data = encode(
            as_stored(image, number), "JPEG", quality=95, exif=oriented(number, big=number % 2 == 0)
        )
        found[f"jpeg turned {number}"] = _form(data, image, lossy=True)
    return found


def _pngs(image: Image.Image) -> dict[str, Form]:
    gray, palette = image.convert("L"), image.quantize(64)
    rgba, gray_alpha = _with_alpha(image)
    pixels, levels = np.asarray(image), np.asarray(gray)[..., None]
    gamma = chunk(b"gAMA", struct.pack(">I", 22727)) + chunk(b"bKGD", struct.pack(">3H", 255, 0, 0))
    return {
        "png": _form(encode(image, "PNG"), image),
        "gray png": _form(encode(gray, "PNG"), gray),
        "png with alpha": _form(encode(rgba, "PNG"), image),
        "gray png with alpha": _form(encode(gray_alpha, "PNG"), gray),
        "black and white png": _form(encode(gray.convert("1"), "PNG"), gray.convert("1")),
        "palette png": _form(encode(palette, "PNG"), palette),
        "palette png of 4 bits": _form(encode(image.quantize(16), "PNG", bits=4), image.quantize(16)),
        "palette png with a transparent color": _form(encode(palette, "PNG", transparency=3), palette),
        "palette png with alpha": _form(encode(palette, "PNG", transparency=bytes(range(64))), palette),
        "png with gamma and background": _form(png(pixels, chunks=gamma), image),
        "interlaced png": _form(png(pixels, interlaced=True), image),
        "animated png": _form(encode(image, "PNG", **_frames()), image),
        "png turned 6": _form(encode(as_stored(image, 6), "PNG", exif=oriented(6)), image),
        "png turned 5": _form(encode(as_stored(image, 5), "PNG", exif=oriented(5, big=False)), image),
        "png of 16 bits": _form(png(pixels.astype(np.uint16) * 257), image),
        "png of 16 bits with alpha": _form(png(np.asarray(rgba).astype(np.uint16) * 257), image),
        "png of 12 bits in 16": _form(png(pixels.astype(np.uint16) * 16), image),
        "png of 12 bits in 16 with alpha": _form(png(_opaque(pixels.astype(np.uint16) * 16)), image),
        "gray png of 12 bits in 16 with alpha": _form(png(_opaque(levels.astype(np.uint16) * 16)), gray),
        "gray png of 16 bits": _form(png(levels.astype(np.uint16) * 257), gray),
        "gray png of 16 bits with alpha": _form(png(np.asarray(gray_alpha).astype(np.uint16) * 257), gray),
        "gray png of 12 bits in 16": _form(png(levels.astype(np.uint16) * 16), gray),
    }


def _webps(image: Image.Image) -> dict[str, Form]:
    rgba, _ = _with_alpha(image)
    turned = as_stored(image, 6)
    return {
        "webp": _form(encode(image, "WEBP", quality=95), image, lossy=True),
        "lossless webp": _form(encode(image, "WEBP", lossless=True), image),
        "webp with alpha": _form(encode(rgba, "WEBP", lossless=True, exact=True), image),
        "animated webp": _form(encode(image, "WEBP", lossless=True, **_frames()), image),
        "webp turned 6": _form(encode(turned, "WEBP", lossless=True, exif=oriented(6)), image),
    }


def _tiffs(image: Image.Image) -> dict[str, Form]:
    gray, palette, cmyk = image.convert("L"), image.quantize(64), image.convert("CMYK")
    rgba, gray_alpha = _with_alpha(image)
    pixels, levels = np.asarray(image), np.asarray(gray)[..., None]
    span = int(levels.max()) - int(levels.min())
    stretched = Image.fromarray(((levels[..., 0] - levels.min()) * (255 / span) + 0.5).astype(np.uint8))
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    wide = {
        f"{name}{' big-endian' if big else ''}": _form(tiff(values, photometric, big=big), look)
        for name, values, photometric, look in (
            ("tiff of 16 bits", pixels.astype(np.uint16) * 257, 2, image),
            ("tiff of 12 bits in 16", pixels.astype(np.uint16) * 16, 2, image),
            ("gray tiff of 16 bits", levels.astype(np.uint16) * 257, 1, gray),
            ("gray tiff of 12 bits in 16", levels.astype(np.uint16) * 16, 1, gray),
            ("tiff of floats in 0 … 1", levels.astype(np.float32) / 255, 1, gray),
            ("tiff of floats in 0 … 255", levels.astype(np.float32), 1, gray),
            ("tiff of small floats", levels.astype(np.float32) / 1e5, 1, stretched),
            ("tiff of floats about 0", levels.astype(np.float32) * 20 - 1000, 1, stretched),
            ("tiff of signed 16 bits", levels.astype(np.int16) * 100 - 9000, 1, stretched),
            ("tiff of signed 32 bits", levels.astype(np.int32) * 10**7 - 10**9, 1, stretched),
        )
        for big in (False, True)
    }
    plain: dict[str, tuple[Image.Image, Image.Image, dict[str, Any]]] = {
        "tiff": (image, image, {}),
        "gray tiff": (gray, gray, {}),
        "palette tiff": (palette, palette, {}),
        "black and white tiff": (gray.convert("1"), gray.convert("1"), {"compression": "group4"}),
        "tiff with alpha": (rgba, image, {}),
        "gray tiff with alpha": (gray_alpha, gray, {}),
        "cmyk tiff": (cmyk, cmyk, {}),
        "tiff by lzw": (image, image, {"compression": "tiff_lzw"}),
        "tiff by deflate": (image, image, {"compression": "tiff_adobe_deflate"}),
        "tiff of pages": (image, image, _frames()),
        "big tiff": (image, image, {"big_tiff": True}),
        **{f"tiff turned {n}": (as_stored(image, n), image, {"tiffinfo": {0x0112: n}}) for n in range(2, 9)},
    }
    return {
        **wide,
        **{
            name: _form(encode(each, "TIFF", **options), look)
            for name, (each, look, options) in plain.items()
        },
        "lab tiff": _form(encode(lab, "TIFF"), image, lossy=True),
        "tiff by jpeg": _form(encode(image, "TIFF", compression="jpeg", quality=95), image, lossy=True),
        "tiff of 12 bits in 16 by deflate": _deflated(pixels.astype(np.uint16) * 16, image),
        "tiff of unsigned 32 bits": _form(tiff(levels.astype(np.uint32) * 16_000_000, 1), stretched),
        "tiff with white 0": _form(tiff(255 - levels, 0), gray),
        "tiff of 16 bits with white 0": _form(tiff(65535 - levels.astype(np.uint16) * 257, 0), gray),
        "planar tiff": _form(tiff(pixels, 2, planar=True), image),
        "planar tiff of 16 bits": _form(tiff(pixels.astype(np.uint16) * 257, 2, planar=True), image),
        "planar tiff of 12 bits in 16": _form(tiff(pixels.astype(np.uint16) * 16, 2, planar=True), image),
    }


def _deflated(values: npt.NDArray[np.uint16], look: Image.Image) -> Form:
    """Of one strip, compressed."""
    plain = tiff(values, 2)
    height, width, _ = values.shape
    packed = zlib.compress(values.astype("<u2").tobytes())
    start = 8 + len(packed)
    tags = [
        (256, 4, width),
        (257, 4, height),
        (259, 3, 8),
        (262, 3, 2),
        (273, 4, 8),
        (277, 3, 3),
        (278, 4, height),
    ]
    tags += [(279, 4, len(packed)), (284, 3, 1)]
    bits = start + 2 + 12 * (len(tags) + 1) + 4
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits)]
    entries += [(tag, code, 1, number) for tag, code, number in tags[2:]]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tail = struct.pack("<H", len(entries)) + directory + bytes(4) + struct.pack("<3H", 16, 16, 16)
    return _form(plain[:4] + struct.pack("<I", start) + packed + tail, look)


def _others(image: Image.Image) -> dict[str, Form]:
    gray, palette = image.convert("L"), image.quantize(64)
    coarse = Image.fromarray(
        (np.asarray(image) >> 3).astype(np.uint16).__mul__(255).__floordiv__(31).astype(np.uint8)
    )
    gif_frames = {"save_all": True, "append_images": [photo(HEIGHT, WIDTH, 2).quantize(64)]}
    numbers = " ".join(map(str, np.asarray(image).ravel().tolist()))
    samples = np.asarray(gray).astype(np.uint16) * 16 + 15
    size = b"%d %d" % (WIDTH, HEIGHT)
    floats = io.BytesIO()
    Image.fromarray(np.asarray(gray).astype(np.float32) / 255).save(floats, "PPM")
    return {
        "gif": _form(encode(palette, "GIF"), palette),
        "animated gif": _form(encode(palette, "GIF", **gif_frames), palette),
        "bmp": _form(encode(image, "BMP"), image),
        "palette bmp": _form(encode(palette, "BMP"), palette),
        "black and white bmp": _form(encode(gray.convert("1"), "BMP"), gray.convert("1")),
        "bmp with alpha": _form(encode(_with_alpha(image)[0], "BMP"), image),
        "bmp of 16 bits": _form(bmp(image, 16), coarse),
        "run-length encoded bmp": _form(bmp(gray, 8), gray),
        "ppm": _form(encode(image, "PPM"), image),
        "pgm": _form(encode(gray, "PPM"), gray),
        "pbm": _form(encode(gray.convert("1"), "PPM"), gray.convert("1")),
        "plain ppm": _form(b"P3 %s 255\n%s\n" % (size, numbers.encode()), image),
        "pgm of 12 bits": _form(b"P5 %s 4095\n%s" % (size, samples.astype(">u2").tobytes()), gray),
        "pgm of 16 bits": _form(b"P5 %s 65535\n%s" % (size, (samples * 16).astype(">u2").tobytes()), gray),
        "pfm": _form(floats.getvalue(), gray),
        **_later_forms(image),
    }


def _later_forms(image: Image.Image) -> dict[str, Form]:
    """JPEG 2000, AVIF and HEIC."""
    pillow_heif.register_heif_opener()
    gray, sharp = image.convert("L"), {"quality": 95, "subsampling": "4:4:4"}
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    return {
        "jpeg 2000": _form(encode(image, "JPEG2000"), image),
        "gray jpeg 2000": _form(encode(gray, "JPEG2000"), gray),
        "jpeg 2000 with alpha": _form(encode(_with_alpha(image)[0], "JPEG2000"), image),
        "gray jpeg 2000 of 16 bits": _form(encode(deep, "JPEG2000"), gray),
        "jpeg 2000 without a container": _form(encode(image, "JPEG2000", no_jp2=True), image),
        "avif": _form(encode(image, "AVIF", **sharp), image, lossy=True),
        "avif turned 6": _form(
            encode(as_stored(image, 6), "AVIF", **sharp, exif=oriented(6)), image, lossy=True
        ),
        "heic": _form(encode(image, "HEIF", quality=95, chroma=444), image, lossy=True),
    }
