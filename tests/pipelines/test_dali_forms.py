"""Nothing reaches DALI that it has not been shown to parse, and that is not decoded as Pillow decodes it."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.dali_forms import may_go_to_dali
from tests.pipelines.forms import HEIGHT, WIDTH, chunk, forms, png
from tests.pipelines.images import encode, in_order, load, photo, write_images

JPEG = encode(photo(60, 90), "JPEG")
PROGRESSIVE = encode(photo(60, 90), "JPEG", progressive=True)
PNG = encode(photo(60, 90), "PNG")
FRAME = JPEG.index(b"\xff\xc0")


def goes(name: str) -> bool:
    data = forms()[name].data
    return may_go_to_dali(data, HEIGHT, WIDTH) or may_go_to_dali(data, WIDTH, HEIGHT)


def test_usual_forms_go_to_dali() -> None:
    """They would be loaded without it too, but slower."""
    for name in (
        "jpeg 4:2:0",
        "gray jpeg",
        "progressive jpeg",
        "jpeg turned 6",
        "png",
        "gray png",
        "png turned 5",
        "webp",
    ):
        assert goes(name), name


def test_no_other_codec_goes_to_dali() -> None:
    others = [name for name in forms() if not any(codec in name for codec in ("jpeg", "png", "webp"))]
    assert len(others) > 50
    assert not any(goes(name) for name in others)


@pytest.mark.parametrize(
    "name",
    [
        "cmyk jpeg",
        "tiff by jpeg",
        "animated png",
        "animated webp",
        "png of 16 bits",
        "black and white png",
        "webp turned 6",
    ],
)
def test_forms_without_a_proof_do_not_go(name: str) -> None:
    assert not goes(name)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        JPEG[:FRAME] + b"\xff\xd9",
        JPEG[:-2],
        JPEG[:400] + b"\xff\xd9",
        JPEG[: FRAME + 1] + b"\xc9" + JPEG[FRAME + 2 :],  # arithmetic coding
        JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :],  # 12 bits
        JPEG[:FRAME] + JPEG[FRAME : FRAME + 19] + JPEG[FRAME:],  # two frames
        JPEG[:-100] + b"\xff\x5a" + JPEG[-98:],
        PROGRESSIVE[:-2] + b"\xff\xda\0\2\xff\xd9",  # a scan of nothing
        PROGRESSIVE[: PROGRESSIVE.index(b"\xff\xc2")]
        + b"\xff\xc2\0\2"
        + PROGRESSIVE[-600:],  # a frame of nothing
        PROGRESSIVE[: PROGRESSIVE.rindex(b"\xff\xda")] + b"\xff\xd9",  # without its last scan
        PNG[:-12],
        PNG[:40] + PNG[-12:],
        PNG[:20] + b"\x01" + PNG[21:],  # a header that its checksum belies
        png(np.zeros((60, 90, 3), np.uint8), chunks=chunk(b"gAMA", bytes(4))[:-1] + b"\x01"),
        b"RIFF",
        b"RIFF\0\0\0\0WEBPVP8X",
        encode(photo(60, 90), "WEBP")[:25],
    ],
)
def test_what_is_damaged_does_not_go(data: bytes) -> None:
    assert not may_go_to_dali(data, 60, 90)


def test_what_has_another_size_does_not_go() -> None:
    """A crop beyond an image ends the process just as an image does that cannot be parsed."""
    for data in (JPEG, PROGRESSIVE, PNG, encode(photo(60, 90), "WEBP")):
        assert may_go_to_dali(data, 60, 90)
        assert not may_go_to_dali(data, 90, 60)
        assert not may_go_to_dali(data, 60, 91)


def test_forms_that_dali_cannot_parse_load_in_large_batches(tmp_path: Path) -> None:
    """These ended the process, each with a segmentation fault in a batch of more than 32."""
    names = (
        "run-length encoded bmp",
        "bmp of 16 bits",
        "pbm",
        "black and white tiff",
        "tiff of floats in 0 … 1",
    )
    images = [forms()["png"].data] * 128
    images[7::25] = [forms()[name].data for name in names]
    manifest = write_images(tmp_path, images, [(HEIGHT, WIDTH)] * 128)
    for batch in load(manifest, in_order(128, 128, epochs=3), "dali", threads=2):
        assert batch.instance_ids.tolist() == list(range(128))
