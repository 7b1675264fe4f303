"""The program of every rank: open the data, train, measure, save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster import snapshots
from cluster.launch import Worker
from instdisc.config import RunConfig
from instdisc.errors import NonFiniteError
from instdisc.optim import learning_rate
from instdisc.probe import Probe, raw_pixels
from instdisc.run_directory import RunDirectory, append_line, write_json
from instdisc.trainer import Trainer, training_dtype
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order

logger = logging.getLogger(__name__)


def train_on_worker(worker: Worker, job: tuple[str, RunConfig, RunDirectory]) -> dict[str, Any]:
    """Train on one rank; the function that `cluster.launch` runs on every worker.

    Args:
        worker: This rank.
        job: Name of the recipe, settings, and the run directory, in which the run is prepared.

    Returns:
        The summary that is also in the run directory.

    Collectives: many; every rank must call.
    """
    recipe, config, run = job
    return _Run(worker, recipe, config, run).complete()


class _Run:
    """One rank's part of one run."""

    def __init__(self, worker: Worker, recipe: str, config: RunConfig, run: RunDirectory) -> None:
        self.worker, self.recipe, self.config, self.run = worker, recipe, config, run
        # After a restart of the workers the run has begun already; the configuration is what moves last.
        self.restarted = not run.next.config.exists()
        prepared = run if self.restarted else run.next
        self.manifest = Manifest.load(prepared.manifest)
        test = Manifest.load(prepared.test_manifest) if prepared.test_manifest.exists() else None
        self.trainer = Trainer(worker, config, len(self.manifest))
        self.probe = Probe(self.trainer, self.manifest, test, self._on_corrupt)
        self.order = Order(
            num_instances=len(self.manifest),
            global_batch=config.training.batch_size,
            seed=config.training.seed,
            world_size=worker.world_size,
            rank=worker.rank,
        )
        self.clock = _Clock()
        self.corrupt: set[Path] = set()

    def complete(self) -> dict[str, Any]:
        """Baselines, training, last measurements, files."""
        self.trainer.exchange.barrier()
        if self.worker.is_first and not self.restarted:
            self.run.begin()
        self.trainer.exchange.barrier()
        if self.restarted:
            self._say("the workers were started again: training begins anew")
        if not self.probe.possible:
            self._say("the training images have no labels: kNN accuracy is skipped")
        baselines: dict[str, float | None] = {}
        if self.config.probe.baselines and self.probe.possible:
            self._say("measuring the baselines: raw pixels and the untrained network")
            baselines = self.probe.measure({"raw_pixels": raw_pixels, "untrained": self.trainer.embed})
        try:
            means = self._train()
        except NonFiniteError as error:
            self._save()
            raise NonFiniteError(
                f"step {self.trainer.steps + 1}: {error}; the weights and the bank from before this step are in "
                f"{self.run.path}. Lower --optimizer.learning-rate or lengthen "
                "--optimizer.warmup-epochs"
            ) from None
        accuracies = self._measure(self.config.training.epochs)
        self._save()
        return self._summarise(baselines, accuracies, means)

    def _train(self) -> dict[str, float]:
        """All epochs; returns the means of the last step."""
        training = self.config.training
        steps_per_epoch = self.order.steps_per_epoch
        total_steps = training.epochs * steps_per_epoch
        means: dict[str, float] = {}
        with open_loader(
            self.manifest,
            self.order.requests(num_epochs=training.epochs),
            augmentation=self.config.augmentation,
            training=True,
            views=self.trainer.objective.views,
            seed=training.seed,
            device=self.worker.device,
            config=self.config.loader,
            on_corrupt=functools.partial(self._on_corrupt, self.manifest),
        ) as loader:
            for step in range(total_steps):
                with self.clock.waiting():
                    batch = next(loader)
                epoch = step / steps_per_epoch
                rate = learning_rate(self.config.optimizer, epoch, training.epochs)
                means = self.trainer.step(batch.images, batch.instance_ids, rate)
                self.clock.tick(training.batch_size)
                done = step + 1
                if done % training.log_every == 0 or done in (1, total_steps):
                    self._log(done, total_steps, rate, means)
                if done % steps_per_epoch == 0 and done < total_steps:
                    self._measure_if_due(done // steps_per_epoch)
        return means

    def _measure_if_due(self, epoch: int) -> None:
        every = self.config.probe.every
        if every and epoch % every == 0:
            self._measure(epoch)

    def _measure(self, epoch: int) -> dict[str, float | None]:
        """KNN accuracy with re-computed embeddings and with the bank as it stands."""
        self.trainer.average_buffers()
        if not self.probe.possible:
            return {}
        accuracies = self.probe.measure({"recomputed": self.trainer.embed}, bank_as="bank")
        if self.worker.is_first:
            values = {f"knn_top1_{name}": value for name, value in accuracies.items()}
            append_line(self.run.metrics, {"kind": "knn", "epoch": epoch, **values})
        return accuracies

    def _log(self, done: int, total_steps: int, rate: float, means: dict[str, float]) -> None:
        images_per_second, waited = self.clock.lap()
        if not self.worker.is_first or not means:
            return
        append_line(
            self.run.metrics,
            {
                "kind": "train",
                "step": done,
                "total_steps": total_steps,
                "epoch": done / self.order.steps_per_epoch,
                "learning_rate": rate,
                "images_per_second": images_per_second,
                "loader_wait_fraction": waited,
                **means,
                **self.trainer.objective.state_dict(),
            },
        )

    def _save(self) -> None:
        """Weights by the first rank, the bank by all.

        Collectives: barriers; every rank must call.
        """
        trainer, config = self.trainer, self.config
        if self.worker.is_first:
            partial = self.run.weights.with_suffix(".tmp")
            torch.save(trainer.embedder.backbone.state_dict(), partial)
            partial.replace(self.run.weights)
            attributes: dict[str, str | int | float] = {
                "manifest_fingerprint": self.manifest.fingerprint,
                "step": trainer.steps,
                "backbone": config.backbone.name,
                **{
                    f"objective.{name}": value for name, value in dataclasses.asdict(config.objective).items()
                },
            }
            snapshots.create_table(self.run.bank, trainer.partition, trainer.bank.rows, attributes)
        trainer.exchange.barrier()
        snapshots.write_rows(self.run.bank, trainer.bank.start, trainer.bank.rows)
        trainer.exchange.barrier()

    def _summarise(
        self, baselines: dict[str, float | None], accuracies: dict[str, float | None], means: dict[str, float]
    ) -> dict[str, Any]:
        exchange = self.trainer.exchange
        waited = exchange.sum(torch.tensor(self.clock.wait_fraction, device=self.worker.device))
        training = self.config.training
        summary = {
            "recipe": self.recipe,
            "knn_top1": accuracies.get("recomputed"),
            "knn_top1_bank": accuracies.get("bank"),
            "knn_top1_raw_pixels": baselines.get("raw_pixels"),
            "knn_top1_untrained": baselines.get("untrained"),
            "knn_protocol": self.probe.protocol,
            "loss": means.get("loss"),
            "epochs": training.epochs,
            "steps": self.trainer.steps,
            "num_instances": len(self.manifest),
            "world_size": self.worker.world_size,
            "device": self.worker.device.type,
            "precision": str(training_dtype(self.config, self.worker.device)).removeprefix("torch."),
            "seed": training.seed,
            "train_seconds": self.clock.train_seconds,
            "images_per_second": self.clock.images_per_second,
            "loader_wait_fraction": float(waited) / self.worker.world_size,
            "corrupt_images": self.run.count_corrupt_images(),
        }
        if self.worker.is_first:
            write_json(self.run.summary, summary)
        return summary

    def _say(self, message: str) -> None:
        if self.worker.is_first:
            append_line(self.run.metrics, {"kind": "status", "message": message})

    def _on_corrupt(self, manifest: Manifest, row: int, name: str, reason: str) -> None:
        path = manifest.root / name
        if path not in self.corrupt:
            self.corrupt.add(path)
            logger.warning("skipping %s: %s", path, reason)
            self.run.add_corrupt_image(manifest, name, reason)


class _Clock:
    """Times the steps: from asking for a batch to the end of its step, so that what lies between steps is left out.

    Fractions and speeds leave the first step out, which starts the loader and compiles.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self._first_step = True
        self._run = _Spent()
        self._lap = _Spent()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for a batch, which begins a step."""
        self._started = time.perf_counter()
        yield
        self._waited = time.perf_counter() - self._started

    def tick(self, images: int) -> None:
        """At the end of a step on so many images."""
        seconds = time.perf_counter() - self._started
        self.train_seconds += seconds
        if not self._first_step:
            self._run.add(seconds, self._waited, images)
            self._lap.add(seconds, self._waited, images)
        self._first_step = False

    def lap(self) -> tuple[float, float]:
        """Images per second and fraction of the time spent waiting since the last call."""
        spent, self._lap = self._lap, _Spent()
        return spent.images_per_second, spent.wait_fraction

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first."""
        return self._run.images_per_second

    @property
    def wait_fraction(self) -> float:
        """Over all steps but the first."""
        return self._run.wait_fraction


@dataclass
class _Spent:
    """Sums over steps."""

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0

    def add(self, seconds: float, waited: float, images: int) -> None:
        self.seconds += seconds
        self.waited += waited
        self.images += images

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_fraction(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0
