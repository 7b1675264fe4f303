from pathlib import Path

import pytest
from PIL import Image

from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.verify import verify
from tests.pipelines.stored import ODD, encode


@pytest.fixture
def odd_images(tmp_path: Path) -> Path:
    for name, content in ODD.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_odd_images_are_sound(odd_images: Path) -> None:
    manifest = build_manifest(odd_images)
    assert len(manifest) == len(ODD)
    assert verify(manifest) is manifest


def test_broken_images_are_left_out_in_order(odd_images: Path) -> None:
    (odd_images / "a-cut.jpg").write_bytes(encode("RGB", "JPEG")[:-200])
    flipped = bytearray(ODD["rgb.png"])
    flipped[len(flipped) // 2] ^= 0xFF
    (odd_images / "flipped.png").write_bytes(flipped)
    manifest = build_manifest(odd_images)
    sound = verify(manifest, workers=2, show_progress=False)
    assert [name for name, _ in sound.rejected] == ["a-cut.jpg", "flipped.png"]
    assert "truncated" in sound.rejected[0].reason
    assert list(sound.keys) == [key for key in manifest.keys if key not in ("a-cut.jpg", "flipped.png")]
    assert sound.sizes.tolist() == [len(ODD[key]) for key in sound.keys]
    assert sound.fingerprint != manifest.fingerprint


def test_data_that_changed_since_is_left_out(odd_images: Path) -> None:
    manifest = build_manifest(odd_images)
    Image.new("RGB", (2, 3)).save(odd_images / "rgb.bmp")
    (odd_images / "rgb.ppm").unlink()
    reasons = dict(verify(manifest, workers=1).rejected)
    assert "the data changed" in reasons["rgb.bmp"] or "truncated" in reasons["rgb.bmp"]
    assert "No such file" in reasons["rgb.ppm"]
    assert len(reasons) == 2


def test_nothing_sound_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encode("RGB", "JPEG")[:-200])
    with pytest.raises(DataError, match=r"none of 1 images can be decoded, e\.g\. cut\.jpg: .*truncated"):
        verify(build_manifest(tmp_path))
