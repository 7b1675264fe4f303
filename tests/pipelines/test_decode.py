from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipelines.decode import CorruptImage, decode_rgb, nearly_constant, to_bytes
from tests.pipelines.forms import tiff
from tests.pipelines.images import encode, photo


@pytest.mark.filterwarnings("error")
def test_large_images_are_decoded_without_a_warning() -> None:
    height, width = 1_000, 90_000  # beyond the number of pixels from which on Pillow warns
    image = decode_rgb(encode(Image.new("1", (width, height), 1), "PNG"), height, width)
    assert image.size == (width, height)
    assert image.getpixel((width - 1, height - 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 255], np.uint16), [0, 128, 255]),
        (np.array([0, 2047, 4095], np.uint16), [0, 127, 255]),
        (np.array([0, 4096], np.uint16), [0, 64]),  # of 14 bits
        (np.array([16384, 65535], np.uint16), [64, 255]),
        (np.array([0, 65536], np.int32), [0, 255]),
        (np.array([-1, 0, 1], np.int16), [0, 128, 255]),
        (np.array([0, 15], np.uint16), [0, 255]),  # less than a sixteenth of the range
        (np.array([0, 16], np.uint16), [0, 16]),
        (np.array([40_000, 40_100], np.uint16), [0, 255]),
        (np.array([40_000, 40_000], np.uint16), [156, 156]),  # constant: as it is
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0.2, 0.4], np.float32), [51, 102]),
        (np.array([0, 1.5], np.float32), [0, 255]),
        (np.array([0, 200], np.float32), [0, 200]),
        (np.array([0, 1e-3], np.float32), [0, 255]),
        (np.array([-3e38, 3e38], np.float32), [0, 255]),
        (np.array([np.nan, 0, 1, np.inf, -np.inf], np.float32), [0, 0, 255, 255, 0]),
        (np.array([np.nan, np.inf], np.float32), [0, 0]),
        (np.array([0, 2**32 - 1], np.uint32), [0, 255]),
    ],
)
def test_the_range_rule(values: npt.NDArray[Any], expected: list[int]) -> None:
    assert to_bytes(values).tolist() == expected


def test_a_range_that_the_file_declares_is_taken() -> None:
    levels = np.array([[0, 100, 400]], ">u2")
    assert to_bytes(levels, white=65535).tolist() == [[0, 0, 2]]
    image = decode_rgb(b"P5 3 1 4095\n" + levels.tobytes(), 1, 3)
    assert [value[0] for value in image.getdata()] == [0, 6, 25]


def test_forms_that_pillow_cannot_decode_are_refused_with_a_reason() -> None:
    four_floats = tiff(np.zeros((4, 4, 3), np.float32), 2)
    with pytest.raises(CorruptImage, match="cannot identify image"):
        decode_rgb(four_floats, 4, 4)


def test_nearly_constant() -> None:
    assert nearly_constant(Image.new("RGB", (5, 4), (1, 100, 255)))
    assert not nearly_constant(photo(5, 4))
    faint = np.zeros((4, 5, 3), np.uint8)
    faint[0, 0] = 7
    assert nearly_constant(Image.fromarray(faint))
    faint[0, 0, 2] = 8
    assert not nearly_constant(Image.fromarray(faint))
