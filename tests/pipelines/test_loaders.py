import gc
import itertools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment import Augmentation
from pipelines.errors import DataError
from pipelines.loader import Batch, LoaderConfig
from pipelines.manifest import Manifest
from pipelines.order import Order, Request
from tests.pipelines.images import (
    BACKENDS,
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

COUNT = 22


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photos(tmp_path_factory.mktemp("photos"), COUNT)


@pytest.mark.parametrize(("training", "views"), [(False, 1), (True, 1), (True, 2), (True, 3)])
def test_shapes_and_memory_layout(manifest: Manifest, backend: str, training: bool, views: int) -> None:
    batches = load(manifest, in_order(COUNT, 8), backend, training=training, views=views)
    assert [len(batch.instance_ids) for batch in batches] == [8, 8, 6]
    assert torch.cat([batch.instance_ids for batch in batches]).tolist() == list(range(COUNT))
    for images, ids in batches:
        assert images.shape == (views, len(ids), 3, 32, 32)
        assert images.dtype == torch.float32
        assert ids.dtype == torch.int64
        assert images.permute(0, 1, 3, 4, 2).is_contiguous()
        assert images[0].is_contiguous(memory_format=torch.channels_last)
        assert images.isfinite().all()


def test_batches_stay_valid_when_the_loader_goes_on(manifest: Manifest, backend: str) -> None:
    loader = open_any(manifest, in_order(COUNT, 4, epochs=4), backend)
    first = next(loader)
    copy = first.images.clone()
    for _ in loader:
        pass
    loader.close()
    assert torch.equal(first.images, copy)


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_any_number_of_batches(manifest: Manifest, backend: str, batches: int, prefetch: int) -> None:
    requests = in_order(COUNT, 4)[:batches]
    with open_any(manifest, requests, backend, prefetch=prefetch) as loader:
        assert len(list(loader)) == batches
        with pytest.raises(StopIteration):
            next(loader)


def test_batches_of_any_size(manifest: Manifest, backend: str) -> None:
    sizes = [3, 1, 1, 7, 2, COUNT, 1, 1, 1, 1, 5]
    requests = [Request(0, np.arange(size)) for size in sizes]
    batches = load(manifest, requests, backend, prefetch=2)
    assert [batch.instance_ids.tolist() for batch in batches] == [list(range(size)) for size in sizes]
    for batch in batches:
        assert torch.equal(batch.images, batches[5].images[:, : len(batch.instance_ids)])


def test_requests_are_taken_lazily(manifest: Manifest, backend: str) -> None:
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        for taken in itertools.count(1):
            yield Request(taken, np.arange(4))

    with open_any(manifest, endless(), backend, prefetch=2) as loader:
        for number, _ in enumerate(loader, 1):
            assert taken <= number + 1 + 2 * 2  # one batch more is being made meanwhile
            if number == 10:
                break


def test_the_stream_depends_on_neither_threads_nor_prefetch_nor_restart(
    manifest: Manifest, backend: str
) -> None:
    order = Order(num_instances=COUNT, global_batch=4, seed=3)
    whole = load(manifest, order.requests(num_epochs=2), backend, views=2)
    for threads, prefetch in ((1, 1), (3, 4)):
        again = load(
            manifest, order.requests(num_epochs=2), backend, views=2, threads=threads, prefetch=prefetch
        )
        assert same(whole, again)
    for epoch, step in ((0, 3), (1, 0), (1, 4)):
        resumed = load(manifest, order.requests(epoch, step, num_epochs=2), backend, views=2)
        assert same(resumed, whole[5 * epoch + step :])


def test_ranks_together_give_the_batch_of_one(manifest: Manifest, backend: str) -> None:
    alone, *ranks = (
        load(
            manifest,
            Order(global_batch=6, world_size=world, rank=rank, **common).requests(num_epochs=1),
            backend,
        )
        for common in ({"num_instances": COUNT, "seed": 1},)
        for world, rank in ((1, 0), (2, 0), (2, 1))
    )
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts], dim=1))
        assert torch.equal(whole.instance_ids, torch.cat([part.instance_ids for part in parts]))


def test_views_epochs_and_seeds_differ(manifest: Manifest, backend: str) -> None:
    rows = np.arange(COUNT)
    requests = [Request(0, rows), Request(1, rows), Request(0, rows)]
    first, other_epoch, again = load(manifest, requests, backend, views=2)
    (other_seed,) = load(manifest, requests[:1], backend, views=2, seed=1)
    assert torch.equal(first.images, again.images)
    variants = torch.cat([batch.images for batch in (first, other_epoch, other_seed)])
    for one, other in itertools.combinations(variants, 2):
        assert ((one - other).abs().mean(dim=(1, 2, 3)) > 0.02).all()
    (single,) = load(manifest, requests[:1], backend, views=1)
    assert torch.equal(single.images[0], first.images[0])


def test_evaluation_is_the_same_in_every_epoch(manifest: Manifest, backend: str) -> None:
    rows = np.arange(COUNT)
    one, other = load(manifest, [Request(0, rows), Request(1, rows)], backend, training=False)
    assert torch.equal(one.images, other.images)


def test_no_thread_outlives_the_loader(manifest: Manifest, backend: str) -> None:
    endless = Order(num_instances=COUNT, global_batch=4, seed=0).requests()

    def use_and_fail() -> None:
        with open_any(manifest, endless, backend) as loader:
            next(loader)
            raise KeyError("the consumer failed")

    before = set(threading.enumerate())
    with pytest.raises(KeyError):
        use_and_fail()
    assert set(threading.enumerate()) <= before


def test_no_file_stays_open_after_the_loader(manifest: Manifest, backend: str) -> None:
    def open_files() -> set[Path]:
        links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return {path for path in links if path.parent == manifest.root}

    gc.collect()
    assert not open_files()
    gc.disable()  # what only the garbage collector would close is not closed
    try:
        for _ in range(3):
            with open_any(manifest, in_order(COUNT, 4), backend) as loader:
                next(loader)
                assert open_files()
            assert not open_files()
    finally:
        gc.enable()


def test_a_closed_loader_is_at_its_end(manifest: Manifest, backend: str) -> None:
    loader = open_any(manifest, Order(num_instances=COUNT, global_batch=4, seed=0).requests(), backend)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_errors_of_the_requests_and_of_the_threads_reach_the_consumer(
    manifest: Manifest, backend: str
) -> None:
    def broken() -> Iterator[Request]:
        yield Request(0, np.arange(4))
        raise OSError("the list of requests is gone")

    with (
        open_any(manifest, broken(), backend) as loader,
        pytest.raises(OSError, match="the list of requests is gone"),
    ):
        next(loader)
    with open_any(manifest, [Request(0, np.array([COUNT]))], backend) as loader, pytest.raises(IndexError):
        next(loader)


def test_an_error_is_raised_once_and_ends_the_loader(manifest: Manifest, backend: str) -> None:
    asked = 0

    def broken() -> Iterator[Request]:
        nonlocal asked
        for asked in itertools.count(1):
            yield Request(0, np.arange(4) if asked != 6 else np.array([COUNT]))

    before = set(threading.enumerate())
    loader = open_any(manifest, broken(), backend, prefetch=2)
    good: list[Batch] = []
    with pytest.raises(IndexError):
        good.extend(loader)
    assert len(good) <= 5
    taken = asked
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
    assert asked == taken
    loader.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_close_while_a_batch_is_being_made(manifest: Manifest, backend: str, consumed: int) -> None:
    asked, making = 0, threading.Event()

    def endless() -> Iterator[Request]:
        nonlocal asked
        for asked in itertools.count(1):
            making.set()
            yield Request(asked, np.arange(4))

    before = set(threading.enumerate())
    loader = open_any(manifest, endless(), backend, prefetch=2)
    for _ in range(consumed):
        next(loader)
    assert making.wait(60)
    loader.close()
    assert asked <= consumed + 1 + 2 * 2  # no more than the batch that was being made
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_strong_and_absent_augmentation(manifest: Manifest, backend: str) -> None:
    plain = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "flip_probability": 0.0}
    requests = in_order(COUNT, COUNT)
    (gray,) = load(
        manifest,
        requests,
        backend,
        augmentation=Augmentation(image_size=16, grayscale_probability=1.0, mean=(0, 0, 0), std=(1, 1, 1)),
    )
    assert (gray.images.amax(dim=2) - gray.images.amin(dim=2)).max() <= 2 / 255
    still = Augmentation(
        image_size=48, crop_scale=(1.0, 1.0), crop_ratio=(0.01, 100.0), grayscale_probability=0, **plain
    )
    (one,) = load(manifest, requests, backend, augmentation=still)
    (other,) = load(manifest, requests, backend, augmentation=still, seed=1)
    assert not still.changes_color
    assert one.images.shape == other.images.shape


def test_training_views_of_another_size(manifest: Manifest, backend: str) -> None:
    augmentation = Augmentation(image_size=32, training_size=20)
    for training, side in ((True, 20), (False, 32)):
        (batch,) = load(
            manifest, in_order(COUNT, COUNT), backend, augmentation=augmentation, training=training
        )
        assert batch.images.shape == (1, COUNT, 3, side, side)


@pytest.mark.parametrize(
    ("options", "message"), [({"views": 0}, "views is 0"), ({"views": 2, "training": False}, "views is 2")]
)
def test_wrong_numbers_of_views(manifest: Manifest, backend: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_any(manifest, [], backend, **options)


def test_wrong_configurations(backend: str) -> None:
    for wrong, message in (({"threads": 0}, "threads is 0"), ({"prefetch": 0}, "prefetch is 0")):
        with pytest.raises(ValueError, match=message):
            LoaderConfig(backend=backend, **wrong)
    with pytest.raises(ValueError, match="expected auto, dali or host"):
        LoaderConfig(backend=backend + "s")


def test_without_dali(
    manifest: Manifest, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (with_dali,) = load(manifest, in_order(4, 4), "auto")
    (expected,) = load(manifest, in_order(4, 4), "dali")
    assert torch.equal(with_dali.images, expected.images)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    if backend == "dali":
        with pytest.raises(DataError, match=r"pip install 'instdisc\[dali\]'"):
            open_any(manifest, [], backend)
    else:
        (without,) = load(manifest, in_order(4, 4), "auto")
        (expected,) = load(manifest, in_order(4, 4), "host")
        assert torch.equal(without.images, expected.images)


@pytest.mark.parametrize(
    ("setting", "expected"), [("1", 1), ("", None), ("0", None), ("4,2", None), ("100000", None)]
)
def test_threads_by_default(
    setting: str, expected: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert LoaderConfig(backend=backend).available_threads() == (expected or cores)
    assert LoaderConfig(backend=backend, threads=7).available_threads() == 7


@pytest.mark.parametrize("views", [1, 2])
def test_nearly_constant_images_are_counted_once(
    tmp_path: Path, backend: str, views: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An image of which a view happens to be flat is none of them."""
    flat = Image.new("RGB", (40, 40), (120, 3, 7))
    sky = Image.fromarray(np.pad(np.asarray(photo(40, 40)), ((400, 0), (0, 400), (0, 0)), mode="constant"))
    images = [encode(each, "PNG") for each in (flat, photo(40, 40), sky, flat)]
    manifest = write_images(tmp_path, images, [(40, 40), (40, 40), (440, 440), (40, 40)])
    with caplog.at_level(logging.WARNING):
        load(manifest, in_order(4, 4, epochs=9), backend, views=views, on_corrupt=None)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "2 images are nearly constant, e.g. 0000, 0003"
    ]
