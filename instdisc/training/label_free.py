"""Numbers without labels, measured while training on a sample of the images that stays the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from instdisc.model.label_free import LabelFree, describe, nearest_others, sampled, usual_views
from instdisc.training.monitor import Embed, MeasurementStopped, raise_where_stopped, until_stopped
from instdisc.training.trainer import Trainer
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request

TRAINED, START = "trained", "start"
"""Names of functions: the network now, and before the first step."""


class LabelFreeMonitor:
    """Measures embeddings of two views, varied as is usual whatever training does, of up to 2,048 training images.

    Images and views are the same at every measurement and for any number of ranks. Rank r of W embeds every W-th of the
    images from the r-th on; all ranks compute the numbers from the embeddings of all.

    Args:
        trainer: Gives the ranks and the settings.
        train: The training images.
        on_corrupt: Called with manifest, row, name and reason for an image that cannot be decoded.
    """

    def __init__(
        self, trainer: Trainer, train: Manifest, on_corrupt: Callable[[Manifest, int, str, str], None]
    ) -> None:
        self._trainer, self._train = trainer, train
        self._on_corrupt = functools.partial(on_corrupt, train)
        self._rows = sampled(len(train))
        self._nearest: Tensor | None = None
        self.neighbors_changed: float | None = None
        """Share of the images whose nearest other one is not that of the measurement before; of the trained network."""

    def measure(self, functions: Mapping[str, Embed]) -> dict[str, LabelFree | None]:
        """Describe every function's embeddings; None where fewer than two images can be decoded.

        Args:
            functions: By name; each maps images (B, 3, H, W) to unit vectors.

        Raises:
            MeasurementStopped: The group was asked to stop.

        Collectives: one all-reduce, and one all-gather for each function; every rank must call.
        """
        views = self._embed(functions)
        if TRAINED in views:
            self._compare(views[TRAINED][0])
        return {
            name: None if len(first) < 2 else describe(first, second)
            for name, (first, second) in views.items()
        }

    def _compare(self, embeddings: Tensor) -> None:
        nearest = nearest_others(embeddings) if len(embeddings) > 1 else None
        before, self._nearest = self._nearest, nearest
        self.neighbors_changed = None
        if before is not None and nearest is not None and before.shape == nearest.shape:
            self.neighbors_changed = float((before != nearest).float().mean())

    @torch.no_grad()
    def _embed(self, functions: Mapping[str, Embed]) -> dict[str, tuple[Tensor, Tensor]]:
        """Both views of the images that can be decoded, in their order: float32 (N, D) each."""
        trainer = self._trainer
        worker, batch = trainer.worker, trainer.local_batch
        own = self._rows[worker.rank :: worker.world_size]
        most = -(-len(self._rows) // worker.world_size)
        # A rank without images still has to know how long the vectors are.
        augmentation = usual_views(trainer.config.augmentation)
        size = augmentation.training_size or augmentation.image_size
        blank = torch.zeros(1, 3, size, size, device=worker.device)
        tables = {
            name: torch.zeros(most, 2, function(blank).shape[1], device=worker.device)
            for name, function in functions.items()
        }
        places = torch.full((most,), -1, dtype=torch.int64)
        reason = None
        try:
            with open_loader(
                self._train,
                (Request(0, own[first : first + batch]) for first in range(0, len(own), batch)),
                augmentation=augmentation,
                training=True,
                views=2,
                seed=trainer.config.training.seed,
                device=worker.device,
                config=trainer.config.loader,
                on_corrupt=self._on_corrupt,
                cache=trainer.config.data.tar_cache(),
                watches_contrast=False,  # training tells of them
            ) as loader:
                done = 0
                for images in until_stopped(worker, loader):
                    chosen = slice(done, done + len(images.instance_ids))
                    done = chosen.stop
                    places[chosen] = images.instance_ids
                    for name, function in functions.items():
                        tables[name][chosen, 0] = function(images.images[0]).float()
                        tables[name][chosen, 1] = function(images.images[1]).float()
        except MeasurementStopped as stopped:
            reason = str(stopped)
        raise_where_stopped(trainer, reason)
        return {name: self._gathered(table, places.to(worker.device)) for name, table in tables.items()}

    def _gathered(self, table: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        rows, rows_of = self._trainer.exchange.gather(table.flatten(1), places)
        order = rows_of.argsort()[(rows_of < 0).sum() :]
        first, second = rows[order].chunk(2, dim=1)
        return F.normalize(first, dim=1), F.normalize(second, dim=1)
