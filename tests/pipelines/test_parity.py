"""DALI and the host loader, pixel by pixel; and both against torchvision, in distribution."""

import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipelines.augment import Augmentation, training_views
from pipelines.build import build_manifest
from pipelines.decode import decode_rgb
from pipelines.headers import image_size
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.reader import ImageReader
from tests.pipelines.agreement import compare
from tests.pipelines.forms import HEIGHT, WIDTH, forms
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


@pytest.fixture(scope="module")
def of_all_forms(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """An image of every form that is accepted, all of one size as shown."""
    folder = tmp_path_factory.mktemp("forms")
    images = [form.data for form in forms().values()]
    sizes = [image_size(lambda count, data=data: data[:count], len(data)) for data in images]
    assert set(sizes) == {(HEIGHT, WIDTH)}
    return write_images(folder, images, sizes)


@pytest.mark.parametrize("backend", ["dali", "host"])
def test_every_form_looks_right(of_all_forms: Manifest, backend: str) -> None:
    augmentation = Augmentation(image_size=HEIGHT)  # the center as it is, not resized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = load(
            of_all_forms, in_order(len(forms()), 64), backend, augmentation=augmentation, training=False
        )
    images = torch.cat([pixels(batch, augmentation)[0] for batch in batches])
    for (name, form), got in zip(forms().items(), images, strict=True):
        expected = v2.functional.pil_to_tensor(form.look.crop((11, 0, 72, 61))).float()
        assert (got - expected).abs().mean() <= (3 if form.lossy else 1), name


def test_all_decoders_agree_on_every_form(of_all_forms: Manifest) -> None:
    for name, worst in compare(of_all_forms, list(forms())).items():
        assert worst.mean <= 1, (name, worst)
        assert worst.quantile <= 8, (name, worst)


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
        apart = (got - expected.float()).abs()
        assert apart.mean() <= 0.5
        assert apart[:, 1:-1, 1:-1].max() <= 2  # at the border torchvision looks at fewer pixels
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
        # torchvision's color space is another, and it cuts at black and white after each of its four changes.
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
        assert torch.equal(one.instance_ids, other.instance_ids)
        on_cpu = one._replace(images=one.images.cpu())
        assert (pixels(on_cpu, augmentation) - pixels(other, augmentation)).abs().mean() <= 2
