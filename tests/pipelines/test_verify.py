import logging
from pathlib import Path

import pytest
from PIL import Image

from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.verify import verify
from tests.pipelines.stored import ODD, encode, png


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
    sound = verify(manifest, show_progress=False)
    assert [name for name, _ in sound.rejected] == ["a-cut.jpg", "flipped.png"]
    assert "truncated" in sound.rejected[0].reason
    assert list(sound.keys) == [key for key in manifest.keys if key not in ("a-cut.jpg", "flipped.png")]
    assert sound.sizes.tolist() == [len(ODD[key]) for key in sound.keys]
    assert sound.fingerprint != manifest.fingerprint


def test_data_that_changed_since_is_left_out(odd_images: Path) -> None:
    manifest = build_manifest(odd_images)
    Image.new("RGB", (200, 300)).save(odd_images / "rgb.bmp")
    (odd_images / "gray.png").write_bytes(png(3, 2).ljust(len(ODD["gray.png"]), b"\0"))
    (odd_images / "rgb.png").write_bytes(ODD["rgb.png"][:-1])
    (odd_images / "rgb.ppm").unlink()
    reasons = dict(verify(manifest).rejected)
    assert len(reasons) == 4
    assert "is 3 x 2 pixels, the manifest says 21 x 34: build it again" in reasons["gray.png"]
    # The last byte decodes nothing, but a loader that gets fewer bytes than promised leaves the image out.
    assert f"has changed since the images were listed: {len(ODD['rgb.png']) - 1} bytes" in reasons["rgb.png"]
    assert "has changed since" in reasons["rgb.bmp"]
    assert "No such file" in reasons["rgb.ppm"]


def test_storage_that_fails_leaves_no_image_out(odd_images: Path) -> None:
    manifest = build_manifest(odd_images)
    odd_images.rename(odd_images.with_name("elsewhere"))
    with pytest.raises(DataError, match="No such file or directory; the data must lie on storage that"):
        verify(manifest)


def test_nothing_sound_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encode("RGB", "JPEG")[:-200])
    with pytest.raises(DataError, match=r"none of 1 images can be decoded, e\.g\. cut\.jpg: .*truncated"):
        verify(build_manifest(tmp_path))


def test_nearly_constant_images_are_counted_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b", "c"):
        Image.new("RGB", (9, 9), (120, 3, 7)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").write_bytes(ODD["rgb.png"])
    manifest = build_manifest(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert verify(manifest) is manifest
    assert "2 images are nearly constant, e.g. b.png, c.png" in caplog.text
