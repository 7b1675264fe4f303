"""DALI and the host loader, pixel by pixel; and both against torchvision, in distribution."""

import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipelines.augment import Augmentation, training_views
from pipelines.build import build_manifest
from pipelines.decode import decode_rgb
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.reader import ImageReader
from tests.pipelines.images import collector, encode, in_order, load, photo, photos, pixels, write_images

COLORLESS = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale_probability": 0.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The bundled test images, 32 x 32."""
    folder = tmp_path_factory.mktemp("small")
    with tarfile.open(Path(__file__).resolve().parents[2] / "data" / "sample-test.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return build_manifest(folder, show_progress=False)


@pytest.fixture(scope="module")
def large(shared_data: Path) -> Manifest:
    """Photographs of the usual sizes, as JPEG."""
    return build_manifest(shared_data / "imagenet-sample-160.tar", show_progress=False)


def difference(manifest: Manifest, augmentation: Augmentation, count: int, **options: object) -> torch.Tensor:
    """Absolute differences (V, B, 3, H, W) between the two loaders, in levels of 255."""
    requests = in_order(count, 64)
    dali, host = (
        torch.cat([pixels(batch, augmentation) for batch in batches], dim=1)
        for batches in (
            load(manifest, requests, backend, augmentation=augmentation, **options)
            for backend in ("dali", "host")
        )
    )
    return (dali - host).abs()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["small", "large"])
@pytest.mark.parametrize("mode", ["evaluation", "crop and flip", "all"])
def test_pixels_agree(data: str, mode: str, request: pytest.FixtureRequest) -> None:
    manifest = request.getfixturevalue(data)
    colors = {} if mode == "all" else COLORLESS
    augmentation = Augmentation(image_size=32 if data == "small" else 224, **colors)
    training = mode != "evaluation"
    apart = difference(manifest, augmentation, 160, training=training, views=2 if training else 1)
    # Per image: no single one may be far off, as it would be if a flip, a crop or a rotation went wrong.
    assert apart.mean(dim=(0, 2, 3, 4)).max() <= 2
    assert apart.mean() <= 0.5


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_odd_sizes_agree(tmp_path: Path, kind: str) -> None:
    sizes = [(1, 1), (1, 9), (9, 1), (3, 200), (200, 3), (7, 5), (33, 31), (500, 40), (32, 32), (17, 301)]
    manifest = write_images(tmp_path, [encode(photo(*size, 3), kind) for size in sizes], sizes)
    for size in (8, 32, 96):
        for training in (False, True):
            augmentation = Augmentation(image_size=size)
            apart = difference(manifest, augmentation, len(sizes), training=training)
            assert apart.mean(dim=(0, 2, 3, 4)).max() <= 2


def png_16_bit(image: Image.Image) -> bytes:
    """A PNG of 16 bits per colour, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = np.asarray(image).astype(">u2") * 257
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows.astype(">u2")))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def odd_modes() -> dict[str, tuple[bytes, Image.Image]]:
    """name -> encoded image and what it must look like."""
    image = photo(61, 83)
    gray, palette, cmyk = image.convert("L"), image.quantize(64), image.convert("CMYK")
    alpha = photo(61, 83, 1).convert("L")
    rgba, gray_alpha = image.copy(), Image.merge("LA", (gray, alpha))
    rgba.putalpha(alpha)
    gray_16 = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    others = [photo(61, 83, seed) for seed in (2, 3)]
    frames = {"save_all": True, "append_images": others}
    return {
        "grey png": (encode(gray, "PNG"), gray),
        "grey jpeg": (encode(gray, "JPEG", quality=95), gray),
        "black and white png": (encode(gray.convert("1"), "PNG"), gray.convert("1")),
        "grey png with alpha": (encode(gray_alpha, "PNG"), gray),
        "png with alpha": (encode(rgba, "PNG"), image),
        "palette png": (encode(palette, "PNG"), palette),
        "palette png with a transparent colour": (encode(palette, "PNG", transparency=3), palette),
        "palette png with alpha": (encode(palette, "PNG", transparency=bytes(range(64))), palette),
        "grey png of 16 bits": (encode(gray_16, "PNG"), gray),
        "png of 16 bits": (png_16_bit(image), image),
        "grey tiff of 16 bits": (encode(gray_16, "TIFF"), gray),
        "cmyk jpeg": (encode(cmyk, "JPEG", quality=95), cmyk),
        "progressive jpeg": (encode(image, "JPEG", quality=95, progressive=True), image),
        "jpeg to be turned": (encode(image, "JPEG", quality=95, exif=turned), image),
        "rgb jpeg": (encode(image, "JPEG", quality=95, keep_rgb=True), image),
        "gif": (encode(palette, "GIF"), palette),
        "animated gif": (
            encode(palette, "GIF", save_all=True, append_images=[o.quantize(64) for o in others]),
            palette,
        ),
        "animated png": (encode(image, "PNG", **frames), image),
        "animated webp": (encode(image, "WEBP", lossless=True, **frames), image),
        "webp": (encode(image, "WEBP", lossless=True), image),
        "webp with alpha": (encode(rgba, "WEBP", lossless=True, exact=True), image),
        "bmp": (encode(image, "BMP"), image),
        "palette bmp": (encode(palette, "BMP"), palette),
        "tiff": (encode(image, "TIFF"), image),
        "tiff of pages": (encode(image, "TIFF", **frames), image),
        "ppm": (encode(image, "PPM"), image),
        "pgm": (encode(gray, "PPM"), gray),
    }


@pytest.mark.parametrize("backend", ["dali", "host"])
def test_odd_modes_look_right(tmp_path: Path, backend: str) -> None:
    modes = odd_modes()
    looks = [wanted.convert("RGB") for _, wanted in modes.values()]
    manifest = write_images(tmp_path, [data for data, _ in modes.values()], [(61, 83)] * len(modes))
    augmentation = Augmentation(image_size=61)  # the centre as it is, not resized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = load(
            manifest, in_order(len(modes), 64), backend, augmentation=augmentation, training=False
        )
    assert batch.instance_ids.tolist() == list(range(len(modes)))
    for name, look, got in zip(modes, looks, pixels(batch, augmentation)[0], strict=True):
        expected = v2.functional.pil_to_tensor(look.crop((11, 0, 72, 61))).float()
        assert (got - expected).abs().mean() <= (3 if "jpeg" in name else 1), name


@pytest.mark.parametrize("backend", ["dali", "host"])
def test_crops_and_flips_are_torchvisions(tmp_path: Path, backend: str) -> None:
    manifest = photos(tmp_path, 12)
    augmentation = Augmentation(image_size=24, **COLORLESS)
    request = Request(5, np.arange(12))
    (batch,) = load(manifest, [request], backend, augmentation=augmentation, seed=9)
    views = training_views(
        augmentation, request.rows, manifest.heights, manifest.widths, seed=9, epoch=5, views=1
    )
    for row, got in enumerate(pixels(batch, augmentation)[0]):
        image = v2.functional.pil_to_tensor(Image.open(tmp_path / f"{row:04}").convert("RGB"))
        box = [int(values[row, 0]) for values in views[:4]]
        expected = v2.functional.resized_crop(image, *box, [24, 24], antialias=True)
        if views.flip[row, 0]:
            expected = v2.functional.horizontal_flip(expected)
        assert (got - expected.float()).abs().max() <= 2
    assert 0 < views.flip.sum() < 12


@pytest.mark.slow
def test_training_statistics_agree_with_each_other_and_torchvision(small: Manifest) -> None:
    augmentation = Augmentation(image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    rows = np.arange(len(small))
    requests = [Request(epoch, rows) for epoch in range(4)]
    dali, host = (
        torch.cat([batch.images.flatten(0, 1) for batch in batches])
        for batches in (
            load(small, requests, backend, augmentation=augmentation, views=2) for backend in ("dali", "host")
        )
    )
    torch.manual_seed(0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, augmentation.crop_scale, antialias=True),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomGrayscale(0.2),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    reader = ImageReader(small)
    torchvision = torch.stack([transform(decode_rgb(reader.read(row), 32, 32)) for row in rows])
    for measure in (torch.mean, torch.std):
        one, other, reference = (measure(values, dim=(0, 2, 3)) for values in (dali, host, torchvision))
        assert (one / other - 1).abs().max() < 0.005
        # torchvision's colour space is another, and it cuts at black and white after each of its four changes.
        assert (one / reference - 1).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["dali", "host"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_gpu_agrees_with_the_cpu(tmp_path: Path, backend: str, kind: str) -> None:
    manifest = photos(tmp_path, 20, kind)
    (tmp_path / "0003").write_bytes(bytes(int(manifest.sizes[3])))
    augmentation = Augmentation(image_size=32)
    options = {"augmentation": augmentation, "views": 2, "on_corrupt": collector([])}
    gpu, cpu = (
        load(manifest, in_order(20, 8, epochs=2), backend, device=torch.device(device), **options)
        for device in ("cuda", "cpu")
    )
    for one, other in zip(gpu, cpu, strict=True):
        assert one.images.is_cuda
        assert one.images[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.instance_ids.cpu(), other.instance_ids)
        on_cpu = one._replace(images=one.images.cpu())
        assert (pixels(on_cpu, augmentation) - pixels(other, augmentation)).abs().mean() <= 2
