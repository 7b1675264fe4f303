"""The program of every rank: open the data, train, measure, save."""

from __future__ import annotations

import functools
import logging
import math
import time
from typing import Any

import torch

from cluster.errors import SnapshotError, SnapshotWriteError
from cluster.exchange import Announcement
from cluster.group import Worker
from cluster.metrics import Endpoint, Metrics, exported
from cluster.snapshot_writer import SnapshotReport
from cluster.snapshots import snapshot_steps, take_over
from cluster.stopping import Stopped, is_deliberate
from instdisc.common.errors import ConfigError, NonFiniteError
from instdisc.common.metrics import TRAINING
from instdisc.model.label_free import raw_pixels
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.run import RunConfig
from instdisc.training.clock import Clock
from instdisc.training.label_free import START, TRAINED, LabelFreeMonitor
from instdisc.training.monitor import FEATURES, RAW_PIXELS, KnnMonitor, Measured, MeasurementStopped
from instdisc.training.optim import learning_rate
from instdisc.training.records import Records
from instdisc.training.saving import RunSnapshots, TrainingProgress
from instdisc.training.trainer import Trainer
from pipelines.errors import DataError
from pipelines.loader import Batch, Loader, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.places import Place

logger = logging.getLogger(__name__)

_STOP, _NO_BATCH = 1, 2  # what ranks tell each other: stop after this step, or before it
_UNREADABLE = "images that could not be read"

Job = tuple[str, RunConfig, RunDirectory]
"""Name of the recipe, settings, and the run directory, in which a new run is prepared."""


def train_on_worker(worker: Worker, job: Job) -> dict[str, Any] | Stopped:
    """Train on one rank; the function that `cluster.launch` runs on every worker.

    Resumes from the newest snapshot of the run, if there is one.

    Args:
        worker: This rank.
        job: What to train.

    Returns:
        The summary that is also in the run directory; or how far it came before it was asked to stop.

    Collectives: many; every rank must call.
    """
    recipe, config, run = job
    metrics = Metrics(TRAINING, run=run.path.name, rank=worker.rank)
    if worker.is_rank_zero:
        # Set before the endpoint opens, so that Prometheus never sees an increase from 0.
        metrics.add("restarts_total", worker.restarts)
    with exported(
        metrics,
        config.metrics,
        local_rank=worker.local_rank,
        world_size=worker.world_size,
        directory=run.targets,
    ) as endpoint:
        try:
            result = TrainingRun(worker, recipe, config, run, metrics).complete()
        except (NonFiniteError, SnapshotError):
            _let_read(endpoint)
            raise
        if not isinstance(result, Stopped):
            _let_read(endpoint)
        elif worker.is_rank_zero and is_deliberate(result.reason):
            # All is saved by now, so the rest of the time may be spent on telling Prometheus.
            _let_read(endpoint, at_most_s=worker.grace_s / 4)
        return result


def _let_read(endpoint: Endpoint | None, at_most_s: float = math.inf) -> None:
    if endpoint is not None:
        endpoint.wait_until_read(at_most_s)


class TrainingRun:
    """One rank's part of one run."""

    def __init__(
        self, worker: Worker, recipe: str, config: RunConfig, run: RunDirectory, metrics: Metrics
    ) -> None:
        self.worker, self.recipe, self.config, self.run = worker, recipe, config, run
        self.metrics = metrics
        # A run that has begun has moved its configuration, last of all its files.
        self.is_new = run.next.config.exists()
        train_images, test_images = run.manifests()
        self.manifest = Manifest.load(train_images)
        test = None if test_images is None else Manifest.load(test_images)
        if test is not None and config.data.classes is not None:
            test = test.of_classes(self.manifest.class_names)
        self.given_weights = run.given_weights()
        self.trainer = Trainer(worker, config, len(self.manifest), self.given_weights)
        self.monitor = KnnMonitor(self.trainer, self.manifest, test, self._on_corrupt)
        if config.snapshots.keep_best == "knn" and not self.monitor.possible:
            raise ConfigError(
                "--snapshots.keep-best is knn, which needs labels, and the training images have none: "
                "instance_recall_1 needs none"
            )
        self.label_free = LabelFreeMonitor(self.trainer, self.manifest, self._on_corrupt)
        self.order = Order(
            num_instances=len(self.manifest),
            global_batch=config.training.batch_size,
            seed=config.training.seed,
            world_size=worker.world_size,
            rank=worker.rank,
        )
        self.total_steps = config.training.epochs * self.order.steps_per_epoch
        self.url = config.snapshots.url or str(run.snapshots)
        self.corrupt: set[Place] = set()
        self.records = Records(self.trainer, run, metrics, self.total_steps)
        self._warned_of_slow_snapshots = False
        self._failure: DataError | None = None
        rows = self.trainer.bank.rows
        metrics.set(
            world_size=worker.world_size,
            epochs=config.training.epochs,
            bank_rows=len(rows),
            bank_bytes=rows.numel() * rows.element_size(),
            bank_element_bytes=rows.element_size(),
            stopping=0 if worker.is_rank_zero else None,
        )

    def complete(self) -> dict[str, Any] | Stopped:
        """Start or resume, train, save the last snapshot, measure."""
        self.trainer.exchange.barrier()
        if self.worker.is_rank_zero and self.is_new:
            take_over(self.url, self.run.next.settings()["run_id"])
            self.run.begin()
        elif self.worker.is_rank_zero:
            self.run.store_epochs(self.config.training.epochs)
        self.trainer.exchange.barrier()
        run_id = self.run.settings().get("run_id")
        self.snapshots = RunSnapshots(
            self.trainer, self.manifest, self.config, self.url, run_id, self.records.best
        )
        try:
            return self._complete()
        finally:
            self.snapshots.abandon()

    def _complete(self) -> dict[str, Any] | Stopped:
        progress = self.snapshots.restore()
        if progress is None:
            self._begin()
        self.clock = Clock(progress.train_seconds if progress else 0.0)
        self.records.train_seconds = self.clock.train_seconds
        self.means = progress.means if progress else {}
        if self.worker.is_rank_zero:
            self.metrics.set(snapshot_timestamp_seconds=self.snapshots.committed_time)
        self._warn_if_stops_are_short()
        try:
            self._announce(resumed=progress is not None)
            reason = self._train()
        except MeasurementStopped as stopped:
            reason = str(stopped)
        except NonFiniteError as error:
            self.metrics.set(loss=math.nan)
            self._save_now()
            raise NonFiniteError(
                f"step {self.trainer.steps + 1}: {error}; the state before this step is in {self.url}. Lower "
                "--optimizer.learning-rate or lengthen --optimizer.warmup-epochs, and start over with --overwrite"
            ) from None
        self._tell_stopping(reason)
        if self.trainer.steps:
            self._save_now()
        if reason == _UNREADABLE:
            self.trainer.exchange.barrier()  # the others are ended once a rank has failed, so all save first
        if self._failure is not None:
            raise DataError(
                f"{self._failure}; what was done is saved, and the same command resumes from step {self.trainer.steps}"
            )
        if reason is None:
            try:
                measured = self._measure(self.config.training.epochs)
                asked = self.worker.is_rank_zero and self.config.snapshots.keep_best
                kept = snapshot_steps(self.url) if asked else []
                return self.records.summary(self.recipe, self.monitor, measured, self.clock, self.means, kept)
            except MeasurementStopped as stopped:
                reason = str(stopped)
                self._tell_stopping(reason)
        return Stopped(reason, f"step {self.trainer.steps} of {self.total_steps}")

    def _tell_stopping(self, reason: str | None) -> None:
        """Tell Prometheus of a deliberate stop, so that nobody is alerted when the run vanishes."""
        if reason is not None and is_deliberate(reason) and self.worker.is_rank_zero:
            self.metrics.set(stopping=1)

    def _warn_if_stops_are_short(self) -> None:
        """Warn if the newest snapshot took so long that a stop may end before the state is saved."""
        seconds, grace_s = self.snapshots.seconds, self.worker.grace_s
        # A stop may have to wait for a snapshot that is being written before it writes another one.
        if self._warned_of_slow_snapshots or not seconds or 2 * seconds <= grace_s:
            return
        self._warned_of_slow_snapshots = True
        self.records.say(
            f"a snapshot takes {seconds:.0f} s and a stop up to twice that, but the workers are killed {grace_s:.0f} s "
            f"after it: raise --stop-grace-s, else up to {self.config.snapshots.every_steps} steps are lost"
        )

    def _begin(self) -> None:
        """Make sure that the given weights were there, and fill the bank if the starting network is to do so."""
        if self.config.init.weights is not None and self.given_weights is None:
            raise ConfigError(
                f"{self.run.path} has no snapshot and lacks {self.run.init_weights.name}, the weights that it began "
                "with: start over with --overwrite"
            )
        if self.config.init.embeds_bank:
            self.records.say("embedding all images with the network at its start, to fill the bank")
            self.trainer.fill_bank(*self.monitor.embed_bank())

    def _announce(self, *, resumed: bool) -> None:
        """Log where training starts; at the beginning, measure the baselines."""
        if self.worker.is_rank_zero and not self.is_new:
            self.run.rewind_journal(self.trainer.steps, self.order.steps_per_epoch)
            start = (
                f"resuming from the snapshot of step {self.trainer.steps}"
                if resumed
                else "starting from the beginning: no snapshot"
            )
            self.records.say(f"{start}, {self.worker.world_size} worker(s)")
        if not self.monitor.possible:
            self.records.say("the training images have no labels: kNN accuracy is skipped")
        else:
            self.records.say(self.monitor.describe())
        if not resumed:
            self.records.label_free(
                0, self.label_free.measure({RAW_PIXELS: raw_pixels, START: self.trainer.embed})
            )
        if self.config.knn.baselines and self.monitor.possible and not resumed:
            self.records.say("measuring the baselines: raw pixels and the untrained network")
            values = self.monitor.measure(
                {
                    RAW_PIXELS: raw_pixels,
                    "untrained": self.trainer.embed,
                    "untrained_features": self.trainer.features,
                }
            ).accuracies
            self.records.baselines(values)
        self._measure_if_due()  # where the run stopped between a snapshot and the measurement that follows it

    def _train(self) -> str | None:
        """Train the remaining epochs; returns the reason if stopped early."""
        training, steps_per_epoch = self.config.training, self.order.steps_per_epoch
        if self.trainer.steps == self.total_steps:
            return None
        with open_loader(
            self.manifest,
            self.order.requests(*divmod(self.trainer.steps, steps_per_epoch), num_epochs=training.epochs),
            augmentation=self.config.augmentation,
            training=True,
            views=self.config.objective.views,
            seed=training.seed,
            device=self.worker.device,
            config=self.config.loader,
            on_corrupt=functools.partial(self._on_corrupt, self.manifest),
            cache=self.config.data.tar_cache(),
        ) as loader:
            due = False  # a snapshot, which waits for the one before it
            batch, announced = self._next(loader)
            while True:
                if batch is None or announced.flag == _NO_BATCH:
                    self.trainer.wait()
                    self._read(leave=0)
                    return _UNREADABLE
                self._launch(batch, announced)
                done = self.trainer.steps
                last = done == self.total_steps or announced.flag
                due = due or done % self.config.snapshots.every_steps == 0
                pause = last or due or self._must_measure()
                if pause:
                    self.trainer.wait()
                self.records.timing(self.clock.tick(training.batch_size), self.clock.waited)
                if pause:
                    self._read(leave=0)  # nobody is to see half a step, or save a step that was not sound
                self._report(self.snapshots.poll())
                if last:
                    return None if done == self.total_steps else self._reason or "another rank"
                if pause:
                    due = not self.snapshots.save(self._progress()) and due
                    self._measure_if_due()
                batch, announced = self._next(loader)
                self._read(leave=1)  # while the device works on the step after it

    def _next(self, loader: Loader) -> tuple[Batch | None, Announcement]:
        """The next batch, announced to all ranks, with the question whether to stop after its step.

        None if this rank has none, as its images cannot be read: then all ranks save what was done before.
        """
        try:
            with self.clock.waiting():
                batch = next(loader)
        except DataError as error:
            self._failure = error
            nothing = torch.full((self.trainer.local_batch,), -1)
            return None, self.trainer.announce(nothing, flag=_NO_BATCH)
        self._reason = self.worker.stop_requested() if self.worker.is_rank_zero else None
        return batch, self.trainer.announce(batch.instance_ids, flag=_STOP if self._reason else 0)

    def _launch(self, batch: Batch, announced: Announcement) -> None:
        optimizer, epoch = self.config.optimizer, self.trainer.steps / self.order.steps_per_epoch
        rate = learning_rate(optimizer, epoch, self.config.training.epochs)
        self.trainer.step(batch.images, announced, rate, frozen=epoch < optimizer.frozen_epochs)

    def _read(self, *, leave: int) -> None:
        """Record what the steps did that were launched, but for so many of the last ones.

        Raises:
            NonFiniteError: On all ranks at the same step, as all read in the same order.
        """
        while self.trainer.unread > leave:
            report = self.trainer.read()
            self.means = report.means
            self.records.step(report)
            if report.step % self.config.training.log_every == 0 or report.step in (1, self.total_steps):
                self.records.log(report, *self.clock.lap())

    def _progress(self) -> TrainingProgress:
        return TrainingProgress(self.clock.train_seconds, self.means)

    def _save_now(self) -> None:
        """Save the current state and wait until it is committed.

        Collectives: all-reduces; every rank must call.

        Raises:
            SnapshotWriteError: On rank 0, if it could not be written.
        """
        self._report(self.snapshots.wait())
        if self.snapshots.is_saved():
            return
        self.snapshots.save(self._progress())
        reports = self.snapshots.wait()
        self._report(reports)
        if self.worker.is_rank_zero and reports[-1].error:
            raise SnapshotWriteError(
                f"step {self.trainer.steps}: the last snapshot could not be written ({reports[-1].error}): free some "
                f"space in {self.url} and rerun the same command; it resumes from the previous snapshot"
            )

    def _report(self, reports: list[SnapshotReport]) -> None:
        """Log and count finished snapshots. A failed one does not stop training."""
        for report in reports:
            if report.error:
                self.metrics.add("snapshot_failures_total")
                logger.warning(
                    "[%d/%d step %d] snapshot failed: %s; training continues, the previous one is kept",
                    *(self.worker.rank, self.worker.world_size, report.step, report.error),
                )
                continue
            self.metrics.observe("snapshot_seconds", report.seconds)
            self._warn_if_stops_are_short()
            if self.worker.is_rank_zero:  # others only know of their own part
                self.metrics.set(snapshot_timestamp_seconds=time.time(), snapshot_bytes=report.num_bytes)

    def _must_measure(self) -> bool:
        """Whether this is the end of an epoch, not the last one, that is to be measured."""
        epoch, step = divmod(self.trainer.steps, self.order.steps_per_epoch)
        every = self.config.knn.every
        return bool(step == 0 and 0 < epoch < self.config.training.epochs and every and epoch % every == 0)

    def _measure_if_due(self) -> None:
        if self._must_measure():
            self._measure(self.trainer.steps // self.order.steps_per_epoch)

    def _measure(self, epoch: int) -> Measured | None:
        """Numbers without labels; with labels kNN accuracy with recomputed embeddings and with the bank."""
        with self.trainer.buffers.averaged():
            numbers = self.label_free.measure({TRAINED: self.trainer.embed})
            self.records.label_free(epoch, numbers, self.label_free.neighbors_changed)
            if not self.monitor.possible:
                return None
            functions = {"recomputed": self.trainer.embed, FEATURES: self.trainer.features}
            measured = self.monitor.measure(functions, bank_as="bank")
        self.records.measurement(epoch, measured)
        return measured

    def _on_corrupt(self, manifest: Manifest, row: int, name: str, reason: str) -> None:
        path = manifest.root / name
        if path not in self.corrupt:
            self.corrupt.add(path)
            self.metrics.add("corrupt_images_total")
            logger.warning("skipping %s: %s", path, reason)
            self.run.add_corrupt_image(manifest, name, reason)
