import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.order import Order, Request
from tests.pipelines.images import (
    BACKENDS,
    collector,
    encode,
    in_order,
    load,
    open_any,
    photo,
    photos,
    same,
    write_images,
)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

COUNT = 24


def blank_middle(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


def spoil_jpeg_tables(data: bytes) -> bytes:
    return data[:40] + bytes(byte ^ 0x5A for byte in data[40:140]) + data[140:]


# name -> (format, what happens to the file)
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "jpeg cut in half": ("JPEG", lambda data: data[: len(data) // 2]),
    "jpeg without its last bytes": ("JPEG", lambda data: data[:-40]),
    "jpeg with spoilt tables": ("JPEG", spoil_jpeg_tables),
    "png cut in half": ("PNG", lambda data: data[: len(data) // 2]),
    "png with a blank middle": ("PNG", blank_middle),
    "png whose middle is missing": ("PNG", lambda data: data[:200] + data[-100:]),
    "webp cut in half": ("WEBP", lambda data: data[: len(data) // 2]),
    "bmp cut in half": ("BMP", lambda data: data[: len(data) // 2]),
    "tiff cut in half": ("TIFF", lambda data: data[: len(data) // 2]),
    "pnm cut in half": ("PPM", lambda data: data[: len(data) // 2]),
    "gif cut in half": ("GIF", lambda data: data[: len(data) // 2]),
    "zeros": ("PNG", lambda data: bytes(len(data))),
    "text": ("PNG", lambda _: b"<html>404</html>" * 20),
    "nothing": ("PNG", lambda _: b""),
}


def spoil(manifest: Manifest, rows: set[int], damage: Callable[[bytes], bytes] = blank_middle) -> None:
    """Damage files that are in the manifest already."""
    for row in rows:
        path = manifest.root / manifest.sources[row]
        path.write_bytes(damage(path.read_bytes()))


def assert_same_but(clean: list, spoilt: list, rows: set[int]) -> None:
    """Every batch is there, in order, unchanged but for the given rows, which are blank."""
    assert len(clean) == len(spoilt)
    for expected, got in zip(clean, spoilt, strict=True):
        bad = torch.tensor([int(row) in rows for row in expected.instance_ids])
        assert torch.equal(got.instance_ids, expected.instance_ids.masked_fill(bad, -1))
        assert torch.equal(got.images[:, ~bad], expected.images[:, ~bad])
        assert (got.images[:, bad] == 0).all()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_costs_one_image(tmp_path: Path, backend: str, damage: str) -> None:
    kind, change = DAMAGES[damage]
    whole = encode(photo(50, 60), kind)
    broken = change(whole)
    manifest = write_images(tmp_path, [whole, broken, whole], [(50, 60)] * 3)
    found: list = []
    (batch,) = load(manifest, in_order(3, 3), backend, training=False, on_corrupt=collector(found))
    assert batch.instance_ids.tolist() == [0, -1, 2]
    assert (batch.images[:, 1] == 0).all()
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert [(row, name) for row, name, _ in found] == [(1, "0001")]
    assert found[0][2]


@pytest.mark.parametrize(
    "bad",
    [{0}, {COUNT - 1}, {5}, {4, 6, 7}, {4, 5, 6, 7}, {3, 4, 8}, {0, 1, 2, 3, 10, 11, 23}, set(range(COUNT))],
    ids=str,
)
@pytest.mark.parametrize("views", [1, 2])
def test_the_stream_goes_on(tmp_path: Path, backend: str, bad: set[int], views: int) -> None:
    manifest = photos(tmp_path, COUNT)
    requests = in_order(COUNT, 4, epochs=3)
    clean = load(manifest, requests, backend, views=views)
    spoil(manifest, bad)
    found: list = []
    spoilt = load(manifest, requests, backend, views=views, on_corrupt=collector(found))
    assert_same_but(clean, spoilt, bad)
    assert sorted(row for row, _, _ in found) == sorted(bad)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_the_stream_goes_on_at_any_depth(tmp_path: Path, backend: str, prefetch: int) -> None:
    manifest = photos(tmp_path, COUNT)
    requests = list(Order(num_instances=COUNT, global_batch=5, seed=2).requests(num_epochs=4))
    requests.append(Request(4, np.array([3])))
    clean = load(manifest, requests, backend)
    spoil(manifest, {3, 17})
    spoilt = load(manifest, requests, backend, prefetch=prefetch, on_corrupt=collector([]))
    assert_same_but(clean, spoilt, {3, 17})


def test_an_image_damaged_during_the_run(tmp_path: Path, backend: str) -> None:
    manifest = photos(tmp_path, COUNT)
    requests = in_order(COUNT, 4, epochs=6)
    clean = load(manifest, requests, backend)
    found: list = []
    with open_any(manifest, requests, backend, on_corrupt=collector(found)) as loader:
        spoilt = [next(loader) for _ in range(6)]
        spoil(manifest, {9})
        spoilt += list(loader)
    assert [row for row, _, _ in found] == [9]
    blank = [batch for batch in spoilt if -1 in batch.instance_ids]
    assert len(blank) >= 3
    for batch, expected in zip(spoilt, clean, strict=True):
        if -1 not in batch.instance_ids:
            assert same([batch], [expected])


def test_files_that_vanish_shrink_or_change(tmp_path: Path, backend: str) -> None:
    manifest = photos(tmp_path, 5)
    (tmp_path / "0000").unlink()
    (tmp_path / "0001").write_bytes((tmp_path / "0001").read_bytes()[:-1])
    (tmp_path / "0002").unlink()
    (tmp_path / "0002").mkdir()
    smaller = encode(photo(20, 20), "PNG")
    (tmp_path / "0003").write_bytes(smaller.ljust(manifest.sizes[3], b"\0"))
    found: list = []
    (batch,) = load(manifest, in_order(5, 5), backend, training=False, on_corrupt=collector(found))
    assert batch.instance_ids.tolist() == [-1, -1, -1, -1, 4]
    reasons = {row: reason for row, _, reason in found}
    assert "No such file" in reasons[0]
    assert "has changed since" in reasons[1]
    assert "cannot be read" in reasons[2]
    assert "is 20 x 20 pixels, the manifest says 61 x 69" in reasons[3]


def test_what_only_pillow_decodes_is_not_lost(tmp_path: Path, backend: str) -> None:
    whole = encode(photo(50, 60), "PNG")
    wrong_checksum = whole[:-16] + bytes(byte ^ 0x5A for byte in whole[-16:-14]) + whole[-14:]
    images = [whole, wrong_checksum, whole[:-12], whole + b"x" * 100]
    manifest = write_images(tmp_path, images, [(50, 60)] * len(images))
    for batch in load(manifest, in_order(4, 4, epochs=3), backend, training=False):
        assert batch.instance_ids.tolist() == [0, 1, 2, 3]
        for image in batch.images[0]:
            assert torch.equal(image, batch.images[0, 0])


def test_corrupt_images_are_logged_by_default(
    tmp_path: Path, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = photos(tmp_path, 4)
    spoil(manifest, {2}, lambda _: b"no image")
    with caplog.at_level(logging.WARNING):
        load(manifest, in_order(4, 4, epochs=2), backend, on_corrupt=None)
    assert [record.message for record in caplog.records] == [
        f"skipping image 0002 (row 2): has changed since the images were listed: 8 bytes instead of {manifest.sizes[2]}"
    ]


def test_data_that_cannot_be_reached_is_an_error(tmp_path: Path, backend: str) -> None:
    (tmp_path / "data").mkdir()
    manifest = photos(tmp_path / "data", 2)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with (
        open_any(manifest, in_order(2, 2), backend) as loader,
        pytest.raises(DataError, match=rf"cannot read {manifest.root}: No such file .*that every node sees"),
    ):
        next(loader)


def test_a_batch_without_any_good_image_is_an_error(tmp_path: Path, backend: str) -> None:
    manifest = photos(tmp_path, 17)
    spoil(manifest, set(range(8, 17)))
    (tmp_path / "0009").unlink()
    found: list = []
    with open_any(manifest, in_order(17, 8), backend, on_corrupt=collector(found)) as loader:
        assert next(loader).instance_ids.tolist() == list(range(8))
        with pytest.raises(
            DataError, match=r"none of the 8 images .*0008 .*; 0009 cannot be read: No such file"
        ):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)
    few = load(manifest, [Request(0, np.arange(8, 15))], backend, on_corrupt=collector(found))
    assert few[0].instance_ids.tolist() == [-1] * 7
