"""The entry to both loaders: one function, two implementations, the same batches."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipelines.augment import Augmentation
from pipelines.batch import Batch, Loader, LoaderJob, OnCorrupt
from pipelines.contrast import ContrastWatch
from pipelines.errors import DataError
from pipelines.handover import Handover, with_index
from pipelines.host import HostLoader
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.settings import CacheConfig, LoaderConfig

__all__ = ["Batch", "Loader", "LoaderConfig", "open_loader"]

logger = logging.getLogger(__name__)


def open_loader(
    manifest: Manifest,
    requests: Iterable[Request],
    *,
    augmentation: Augmentation,
    device: torch.device,
    config: LoaderConfig,
    training: bool = False,
    views: int = 1,
    seed: int = 0,
    on_corrupt: OnCorrupt | None = None,
    cache: CacheConfig | None = None,
    watches_contrast: bool = True,
) -> Loader:
    """Open a loader over a stream of requests.

    Args:
        manifest: Where the images are.
        requests: Which images to load, from `Order.requests` or any other source; may be endless, is consumed a
            few batches ahead. Batches may differ in size, but each that is larger than all before costs time.
        augmentation: Size, normalisation and, in training, the random variation of the images.
        device: Where the images go; DALI also decodes there.
        config: How they are produced.
        training: Random views if true, else the centre of each image.
        views: Views per image, V; 1 in evaluation.
        seed: Key of the random views.
        on_corrupt: Called with (row, name, reason) once for each image that cannot be decoded, from a thread of the
            loader, before the batch is returned; a warning is logged by default.
        cache: Where tars of object storage are kept on this node, if they are.
        watches_contrast: Whether, in training on the CPU, closing it warns of the images that are nearly constant.

    Returns:
        An iterator over `Batch`, to be closed (it is a context manager). On a GPU batches are to be taken in the
        thread, and on the stream, that will use them: see `pipelines.handover`.

    Raises:
        DataError: If DALI is requested and not installed.
        ValueError: If `views` does not fit.
    """
    if views < 1 or (views > 1 and not training):
        raise ValueError(f"views is {views}, expected at least 1 in training and exactly 1 in evaluation")
    device = with_index(device)
    job = LoaderJob(
        manifest=manifest,
        requests=requests,
        augmentation=augmentation,
        training=training,
        views=views,
        seed=seed,
        device=device,
        threads=config.available_threads(),
        prefetch=config.prefetch,
        on_corrupt=on_corrupt or _warn,
        cache=cache,
    )
    # A batch on a GPU is not looked at: that would make its step wait.
    watches_contrast = watches_contrast and training and device.type == "cpu"
    watch = ContrastWatch(manifest, augmentation, cache) if watches_contrast else None
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if config.backend == "host" or (config.backend == "auto" and not has_dali):
        return _OneAhead(HostLoader(job), Handover(device), watch)
    if not has_dali:
        raise DataError(
            "the DALI loader was requested but DALI is not installed: install the extra with "
            "`pip install 'instdisc[dali]'`, or set the loader's backend to host"
        )
    from pipelines.dali import DaliLoader  # not at the top: DALI is optional

    return _OneAhead(DaliLoader(job), Handover(device), watch)


class _OneAhead(Loader):
    """Implements `Loader`: has the next batch put together in a thread while the consumer works on this one."""

    def __init__(self, loader: Loader, handover: Handover, watch: ContrastWatch | None) -> None:
        self._loader, self._handover, self._watch = loader, handover, watch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=handover.enter_thread)
        self._following: Future[Batch | None] | None = self._thread.submit(self._next)

    def __next__(self) -> Batch:
        if self._following is None:
            raise StopIteration
        following, self._following = self._following, None  # an error is raised once, and ends the loader
        batch = following.result()
        if batch is None:
            raise StopIteration
        self._following = self._thread.submit(self._next)
        return self._handover.give(batch)

    def close(self) -> None:
        """Stop the threads and drop the batches under way. The loader yields nothing more."""
        self._following = None
        self._thread.shutdown()
        self._loader.close()
        if self._watch:
            self._watch.close()

    def _next(self) -> Batch | None:
        batch = next(self._loader, None)
        if batch is None:
            return None
        if self._watch:
            self._watch.look(batch)
        return self._handover.complete(batch)


def _warn(row: int, name: str, reason: str) -> None:
    logger.warning("skipping image %s (row %d): %s", name, row, reason)
