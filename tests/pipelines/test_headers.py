import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines import kinds
from pipelines.headers import MAX_PIXELS, HeaderError, image_size
from tests.pipelines.stored import HEIGHT, ODD, WIDTH


def size_of(content: bytes) -> tuple[int, int]:
    return image_size(lambda count: content[:count], len(content))


@pytest.mark.parametrize("name", ODD)
def test_finds_the_size_as_shown(name: str) -> None:
    assert size_of(ODD[name]) == as_shown(name)


def as_shown(name: str) -> tuple[int, int]:
    return (WIDTH, HEIGHT) if name == "progressive.jpeg" else (HEIGHT, WIDTH)


def test_reads_little_of_a_large_file() -> None:
    content = ODD["rgb.jpg"] + bytes(10_000_000)
    read = 0

    def head(count: int) -> bytes:
        nonlocal read
        read += count
        return content[:count]

    assert image_size(head, len(content)) == (HEIGHT, WIDTH)
    assert read < 10_000


def test_skips_fill_bytes_between_jpeg_segments() -> None:
    content = ODD["rgb.jpg"]
    assert size_of(content[:2] + b"\xff" * 5 + content[2:]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "progressive.jpeg"])
def test_never_guesses_from_a_header_that_is_cut_short(name: str) -> None:
    content = ODD[name]
    steps = np.unique(np.geomspace(1, len(content), 300).astype(int))
    sizes = []
    for length in steps:
        try:
            sizes.append(size_of(content[:length]))
        except HeaderError:
            assert not sizes, f"the header was whole before byte {length}"
    assert set(sizes) == {as_shown(name)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><title>404 Not Found</title>", "not an image.*<!DOCTYP"),
        (ODD["rgb.png"][:20], "cut short: its 20 bytes"),
        (ODD["progressive.jpeg"][:70_000], "cut short: its 70000 bytes"),
        (ODD["lossy.webp"][:10], "not an image"),
        (ODD["rgb.png"][:16] + bytes(8) + ODD["rgb.png"][24:], "0 x 0 pixels"),
        (ODD["rgb.png"][:8] + bytes(40), "without a header chunk"),
        (b"\xff\xd8\xff\xd9" + bytes(20), "without a segment at byte 2"),
        (b"\xff\xd8\xff\xe0\x00\x02" + bytes(20), "without a segment at byte 6"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    ],
)
def test_says_what_is_wrong(content: bytes, reason: str) -> None:
    with pytest.raises(HeaderError, match=reason):
        size_of(content)


def header_of_png(height: int, width: int) -> bytes:
    png = ODD["rgb.png"]
    return png[:16] + width.to_bytes(4) + height.to_bytes(4) + png[24:]


@pytest.mark.parametrize("form", [header_of_png, lambda height, width: b"P6 %d %d 255\n" % (width, height)])
@pytest.mark.filterwarnings("error")
def test_one_limit_for_the_number_of_pixels(form: Callable[[int, int], bytes]) -> None:
    assert size_of(form(MAX_PIXELS // 2, 2)) == (MAX_PIXELS // 2, 2)
    for height, width in ((MAX_PIXELS + 1, 1), (14_000, 14_000), (200_000, 200_000)):
        with pytest.raises(
            HeaderError, match=f"too large: {height} x {width} pixels, the most are 178,956,970"
        ):
            size_of(form(height, width))


MAGIC = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"BM", b"II*\x00", b"P6 ")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, of damaged TIFFs
@given(st.sampled_from(MAGIC), st.binary())
def test_damaged_bytes_give_a_reason_or_a_size(magic: bytes, rest: bytes) -> None:
    content = magic + rest
    try:
        height, width = size_of(content)
    except HeaderError:
        return
    assert height > 0
    assert width > 0


def test_agrees_with_pillow_on_photographs(shared_data: Path) -> None:
    with tarfile.open(shared_data / "imagenet-sample-160.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            with Image.open(io.BytesIO(content)) as image:
                width, height = ImageOps.exif_transpose(image).size
                assert size_of(content) == (height, width), member.name


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(
        kinds, "_heic_formats", kinds._heic_formats.__wrapped__
    )  # it remembers that it was there
    with pytest.raises(HeaderError, match=r"HEIC needs an extra: pip install 'instdisc\[heic\]'"):
        size_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))


def test_what_pillow_gives_to_other_programs_is_not_opened() -> None:
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n"):
        with pytest.raises(HeaderError, match="not an image, or one of a form that Pillow cannot read"):
            size_of(content)
