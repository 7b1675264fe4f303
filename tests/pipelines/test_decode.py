import pytest
from PIL import Image

from pipelines.decode import decode_rgb
from tests.pipelines.images import encode


@pytest.mark.filterwarnings("error")
def test_large_images_are_decoded_without_a_warning() -> None:
    height, width = 1_000, 90_000  # beyond the number of pixels from which on Pillow warns
    image = decode_rgb(encode(Image.new("1", (width, height), 1), "PNG"), height, width)
    assert image.size == (width, height)
    assert image.getpixel((width - 1, height - 1)) == (255, 255, 255)
