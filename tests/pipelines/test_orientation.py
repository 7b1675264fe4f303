import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.augment import Augmentation, training_views
from pipelines.build import build_manifest
from pipelines.decode import turned
from pipelines.exif import orientation
from pipelines.headers import image_size
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader
from pipelines.turns import views_as_stored
from tests.pipelines.forms import as_stored, chunk, forms, oriented, png
from tests.pipelines.images import BACKENDS, encode, in_order, load, photo, pixels

FORMS = ("JPEG", "PNG", "WEBP", "TIFF")


def stored(look: Image.Image, kind: str, number: int) -> bytes:
    options = {"tiffinfo": {0x0112: number}} if kind == "TIFF" else {"exif": oriented(number)}
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    return encode(as_stored(look, number), kind, **options, **({} if kind in ("PNG", "TIFF") else lossless))


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("number", range(1, 9))
def test_pictures_are_as_pillow_turns_them(tmp_path: Path, kind: str, number: int) -> None:
    (tmp_path / f"a.{kind.lower()}").write_bytes(stored(photo(40, 57), kind, number))
    manifest = build_manifest(tmp_path, show_progress=False)
    assert (manifest.heights[0], manifest.widths[0]) == (40, 57)
    with Image.open(tmp_path / f"a.{kind.lower()}") as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    got = ImageReader(manifest).decode(0)
    assert np.array_equal(got, expected)
    assert np.abs(np.asarray(got, float) - np.asarray(photo(40, 57))).mean() < 2


@pytest.mark.parametrize("views", [1, 2])
def test_dali_turns_views_as_if_the_image_had_been_stored_upright(tmp_path: Path, views: int) -> None:
    """Lossless, so that there is no difference but of rounding; colors and flips are drawn alike."""
    look = photo(40, 57)
    for number in range(1, 9):
        (tmp_path / f"{number}.png").write_bytes(stored(look, "PNG", number))
    manifest = build_manifest(tmp_path, show_progress=False)
    augmentation = Augmentation(image_size=24)
    batches = [
        pixels(batch, augmentation)
        for backend in BACKENDS
        for batch in load(manifest, in_order(8, 8, epochs=4), backend, augmentation=augmentation, views=views)
    ]
    dali, host = torch.stack(batches).chunk(2)
    apart = (dali - host).abs()
    assert apart.mean(dim=(1, 3, 4, 5)).max() <= 1
    assert apart.quantile(0.999) <= 8


def old_and_new(folder: Path) -> tuple[Manifest, Manifest]:
    """Manifests of the same images by the rules of schema 1 and of today."""
    for number, kind in ((6, "JPEG"), (8, "PNG"), (3, "WEBP"), (6, "TIFF"), (1, "JPEG")):
        (folder / f"{number}.{kind.lower()}").write_bytes(stored(photo(40, 57), kind, number))
    return (build_manifest(folder, show_progress=False, upright=upright) for upright in (False, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_manifest_of_an_earlier_release_turns_nothing(tmp_path: Path, backend: str) -> None:
    (tmp_path / "data").mkdir()
    built, new = old_and_new(tmp_path / "data")
    built.save(tmp_path / "old")
    old = Manifest.load(tmp_path / "old")
    assert '"schema": 1' in (tmp_path / "old" / "meta.json").read_text()
    assert (old.upright, new.upright) == (False, True)
    assert old.select(np.arange(2)).upright is False
    # Pillow has always turned TIFFs.
    sizes = {key: (int(old.heights[row]), int(old.widths[row])) for row, key in enumerate(old.keys)}
    assert sizes == {
        "1.jpeg": (40, 57),
        "3.webp": (40, 57),
        "6.jpeg": (57, 40),
        "6.tiff": (40, 57),
        "8.png": (57, 40),
    }
    augmentation = Augmentation(image_size=40)
    (batch,) = load(old, in_order(5, 5), backend, augmentation=augmentation, training=False)
    for row, key in enumerate(old.keys):
        number, kind = int(key[0]), key.partition(".")[2].upper()
        look = photo(40, 57) if kind == "TIFF" else as_stored(photo(40, 57), number)
        assert np.abs(np.asarray(ImageReader(old).decode(row), float) - np.asarray(look)).mean() < 2
        left, top = (look.width - 40) // 2, (look.height - 40) // 2
        middle = np.asarray(look.crop((left, top, left + 40, top + 40)), np.float32)
        got = pixels(batch, augmentation)[0, row].permute(1, 2, 0).numpy()
        assert np.abs(got - middle).mean() < 2, key


def test_images_listed_today_are_known_again_by_a_manifest_of_an_earlier_release(tmp_path: Path) -> None:
    old, new = old_and_new(tmp_path)
    assert old.fingerprint != new.fingerprint
    assert new.by_the_rules_of(old).fingerprint == old.fingerprint
    assert new.by_the_rules_of(new) is new
    assert new.select(np.arange(3)).by_the_rules_of(old).fingerprint != old.fingerprint
    changed = new.select(np.array([0, 1, 2, 4, 3]))
    assert changed.by_the_rules_of(old).fingerprint != old.fingerprint


@pytest.mark.parametrize(
    "name", [name for name in forms() if "turned" in name and name.split()[0] not in ("tiff", "avif")]
)
def test_the_answer_is_known_from_some_byte_on(name: str) -> None:
    data = forms()[name].data
    answers = [orientation(data[:length]) for length in range(30, len(data) + 1)]
    whole = orientation(data)
    assert str(whole) == name[-1]
    first = next(length for length, answer in enumerate(answers) if answer is not None)
    assert set(answers[first:]) == {whole}


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(40),
        oriented(6)[:-9],
        oriented(9),
        oriented(0),
        oriented(6).replace(b"MM", b"XX"),
    ],
)
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    data = png(np.zeros((3, 5, 3), np.uint8), chunks=chunk(b"eXIf", exif))
    assert orientation(data) == 1
    assert image_size(lambda count: data[:count], len(data)) == (3, 5)


def test_boxes_are_moved_to_where_they_lie_in_the_stored_image() -> None:
    """A box of the shown image, cut from the stored one and turned, is that box."""
    look = photo(40, 57)
    rows, sizes = np.arange(9), np.tile(np.array([[40, 57]], np.int32), (9, 1))
    shown = training_views(
        Augmentation(image_size=8), rows, sizes[:, 0], sizes[:, 1], seed=0, epoch=0, views=5
    )
    orientations = np.arange(9).clip(1)
    moved = views_as_stored(shown, orientations, sizes)
    for index, number in enumerate(orientations.tolist()):
        for view in range(5):
            top, left, height, width = (int(values[index, view]) for values in moved[:4])
            cut = as_stored(look, number).crop((left, top, left + width, top + height))
            top, left, height, width = (int(values[index, view]) for values in shown[:4])
            expected = look.crop((left, top, left + width, top + height))
            assert np.array_equal(turned(cut, number), expected)


def test_a_file_that_lies_about_its_size_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sizes as stored are not those as shown: DALI would cut beyond the image."""
    (tmp_path / "a.png").write_bytes(stored(photo(40, 57), "PNG", 6))
    manifest = build_manifest(tmp_path, show_progress=False)
    swapped = Manifest(**{**vars(manifest), "heights": manifest.widths, "widths": manifest.heights})
    with caplog.at_level(logging.WARNING):
        (batch,) = load(swapped, in_order(1, 1), "dali", on_corrupt=None)
    assert batch.instance_ids.tolist() == [-1]
    assert "is 40 x 57 pixels, the manifest says 57 x 40" in caplog.text
