"""What a run tells of itself while it trains: lines of its journal, Prometheus' metrics and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cluster.metrics import Metrics
from instdisc.common.files import append_line, write_json
from instdisc.common.metrics import TRAINING
from instdisc.model.label_free import LabelFree
from instdisc.model.votes import Accuracy
from instdisc.runs.run_directory import RunDirectory
from instdisc.training.clock import Clock
from instdisc.training.label_free import START, TRAINED
from instdisc.training.monitor import RAW_PIXELS, KnnMonitor, Measured, journal_entry
from instdisc.training.observed import StepReport
from instdisc.training.trainer import Trainer, training_dtype

_GAUGES = {metric.name for metric in TRAINING.metrics if metric.kind == "gauge"}


class Records:
    """One rank's records. The files of the run directory are written by rank 0 alone.

    Args:
        trainer: Gives the ranks, the number of steps done, the objective and the bytes sent.
        run: Where the journal and the summary lie.
        metrics: This rank's.
        total_steps: Of the whole run.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory, metrics: Metrics, total_steps: int) -> None:
        self._trainer, self._run, self._metrics = trainer, run, metrics
        self._total_steps = total_steps
        self._sent_bytes = 0
        self.train_seconds = 0.0
        """Of all steps so far; noted with every measurement."""

    def say(self, message: str) -> None:
        """Tell the user, through the journal that the progress bar follows."""
        self._append({"kind": "status", "message": message})

    def timing(self, seconds: float, waited: float) -> None:
        """Record the metrics of a step that took `seconds`, of which it `waited` for images."""
        metrics, trainer = self._metrics, self._trainer
        self.train_seconds += seconds
        metrics.observe("step_seconds", seconds)
        metrics.observe("data_wait_seconds", waited)
        for phases in trainer.phases.finish_step():
            for name, spent in phases.items():
                metrics.observe(f"{name}_seconds", spent)
        metrics.add("images_total", trainer.local_batch)
        sent = trainer.exchange.sent_bytes
        metrics.add("exchange_bytes_total", sent - self._sent_bytes)
        self._sent_bytes = sent

    def step(self, report: StepReport) -> None:
        """Record the metrics of what a step did."""
        means = report.means
        self._metrics.set(
            epoch=self._epoch(report.step),
            learning_rate=report.learning_rate,
            loss=means.get("loss"),
            gradient_norm=means.get("gradient_norm"),
            positive_similarity=means.get("positive_similarity"),
            negative_similarity=means.get("negative_similarity"),
            embedding_norm=means.get("embedding_norm"),
            **{name: value for name, value in report.numbers.items() if name in _GAUGES},
        )

    def log(self, report: StepReport, images_per_second: float, waited: float) -> None:
        """Add a line about the steps since the last one; `waited` is the fraction spent waiting for images."""
        if report.means:
            self._append(
                {
                    "kind": "train",
                    "step": report.step,
                    "total_steps": self._total_steps,
                    "epoch": self._epoch(report.step),
                    "train_seconds": self.train_seconds,
                    "learning_rate": report.learning_rate,
                    "images_per_second": images_per_second,
                    "loader_wait_fraction": waited,
                    **report.means,
                    **report.numbers,
                }
            )

    def baselines(self, accuracies: Mapping[str, Accuracy | None]) -> None:
        """Add the line of the baselines, unless a start of this run has done so."""
        if self._trainer.worker.is_rank_zero and not self._run.baselines():
            self._append({"kind": "baselines", **journal_entry(accuracies)})

    def label_free(
        self, epoch: int, numbers: Mapping[str, LabelFree | None], neighbors_changed: float | None = None
    ) -> None:
        """Record numbers without labels by what they are of, unless a start of this run has done so."""
        trained = numbers.get(TRAINED)
        if trained is not None:
            self._metrics.set(
                instance_recall_ratio=trained.instance_recall_1, effective_rank=trained.effective_rank
            )
        if not self._trainer.worker.is_rank_zero:
            return
        known = {(line["epoch"], line["of"]) for line in self._run.label_free()}
        for name, each in numbers.items():
            if each is not None and (epoch, name) not in known:
                changed = {"neighbors_changed": neighbors_changed} if name == TRAINED else {}
                self._append({**self._measured("label_free", epoch), "of": name, **each._asdict(), **changed})

    def best(self, steps: Sequence[int]) -> int | None:
        """Of these steps the one after which the number of `--snapshots.keep-best` was best, the last of equal ones.

        None if none of them was measured, or none is to be kept. Rank 0 knows it.
        """
        values = self._values()
        measured = [step for step in steps if step in values]
        return max(measured, key=lambda step: (values[step], step), default=None)

    def _best_snapshot(self, kept: Sequence[int]) -> dict[str, Any] | None:
        step = self.best(kept)
        if step is None:
            return None
        number = self._trainer.config.snapshots.keep_best
        return {"by": number, "step": step, "value": self._values()[step]}

    def _values(self) -> dict[int, float]:
        """The number by which the best snapshot is kept, by the steps after which it was measured."""
        number = self._trainer.config.snapshots.keep_best
        if number is None or not self._trainer.worker.is_rank_zero:
            return {}
        steps_per_epoch = self._total_steps // self._trainer.config.training.epochs
        field = "knn_top1_recomputed" if number == "knn" else number
        return {
            line["epoch"] * steps_per_epoch: line[field]
            for line in self._run.measurements()
            if line.get(field) is not None
        }

    def measurement(self, epoch: int, measured: Measured) -> None:
        """Record what was measured after `epoch`, unless a start of this run has done so."""
        accuracies = measured.accuracies
        recomputed, bank = accuracies["recomputed"], accuracies["bank"]
        if recomputed is not None and bank is not None:
            self._metrics.set(
                knn_accuracy_ratio=recomputed.top1,
                knn_balanced_accuracy_ratio=recomputed.balanced,
                bank_knn_accuracy_ratio=bank.top1,
                knn_k=recomputed.k,
            )
        if self._trainer.worker.is_rank_zero and not self._run.has_accuracy(epoch):
            entry = {**self._measured("knn", epoch), **journal_entry(accuracies, "knn_top1_")}
            self._append({**entry, "readout": measured.readout})

    def summary(
        self,
        recipe: str,
        monitor: KnnMonitor,
        measured: Measured | None,
        clock: Clock,
        means: Mapping[str, float],
        kept: Sequence[int],
    ) -> dict[str, Any]:
        """The summary of a finished run, which rank 0 also writes.

        Args:
            recipe: Its name.
            monitor: That measured.
            measured: After the last step; None if nothing could be.
            clock: That timed the steps.
            means: Of the last step.
            kept: Steps of the snapshots that are left.

        Collectives: an all-reduce; every rank must call.
        """
        worker, config = self._trainer.worker, self._trainer.config
        waited = self._trainer.exchange.sum(torch.tensor(clock.wait_fraction, device=worker.device))
        summary = {
            "recipe": recipe,
            **self._accuracies(measured),
            **self._label_free(),
            "knn_protocol": monitor.protocol,
            **monitor.counts(None if measured is None else measured.accuracies["recomputed"]),
            "loss": means.get("loss"),
            "best_snapshot": self._best_snapshot(kept),
            "init_weights": config.init.weights,
            "epochs": config.training.epochs,
            "steps": self._trainer.steps,
            "num_instances": self._trainer.partition.num_rows,
            "world_size": worker.world_size,
            "device": worker.device.type,
            "precision": str(training_dtype(config, worker.device)).removeprefix("torch."),
            "seed": config.training.seed,
            "train_seconds": clock.train_seconds,
            "images_per_second": clock.images_per_second,
            "loader_wait_fraction": float(waited) / worker.world_size,
            "corrupt_images": self._run.count_corrupt_images(),
        }
        if worker.is_rank_zero:
            write_json(self._run.summary, summary)
        return summary

    def _accuracies(self, measured: Measured | None) -> dict[str, Any]:
        """KNN accuracies of the pixels, the start and the end of the run; None where none was measured."""
        baselines = self._run.baselines() if self._trainer.worker.is_rank_zero else {}
        accuracies = {} if measured is None else measured.accuracies
        recomputed, bank = accuracies.get("recomputed"), accuracies.get("bank")
        whitened = accuracies.get("recomputed_whitened")
        readout = None if measured is None else measured.readout
        features = accuracies.get("features_whitened")
        read = {"whitened": whitened, "features": features}.get(readout or "", recomputed)
        return {
            "knn_top1": recomputed and recomputed.top1,
            "knn_top1_bank": bank and bank.top1,
            "knn_top1_raw_pixels": baselines.get("raw_pixels"),
            "knn_top1_untrained": baselines.get("untrained"),
            "knn_top1_whitened": whitened and whitened.top1,
            "knn_top1_raw_pixels_whitened": baselines.get("raw_pixels_whitened"),
            "knn_top1_untrained_whitened": baselines.get("untrained_whitened"),
            "knn_top1_features": features and features.top1,
            "knn_top1_untrained_features": baselines.get("untrained_features_whitened"),
            "readout": readout,
            "knn_top1_readout": read and read.top1,
            "knn_balanced": recomputed and recomputed.balanced,
            "knn_balanced_bank": bank and bank.balanced,
            "knn_balanced_raw_pixels": baselines.get("balanced_raw_pixels"),
            "knn_balanced_untrained": baselines.get("balanced_untrained"),
            "knn_k": recomputed and recomputed.k,
            "knn_k_bank": bank and bank.k,
        }

    def _label_free(self) -> dict[str, Any]:
        """Numbers without labels: by name of pixels, the start and the end; and of how many images."""
        newest = (
            {line["of"]: line for line in self._run.label_free()} if self._trainer.worker.is_rank_zero else {}
        )
        return {
            "label_free": {
                name: {of: newest.get(of, {}).get(name) for of in (RAW_PIXELS, START, TRAINED)}
                for name in LabelFree._fields
                if name != "images"
            },
            "label_free_images": newest.get(TRAINED, {}).get("images"),
        }

    def _measured(self, kind: str, epoch: int) -> dict[str, Any]:
        return {"kind": kind, "epoch": epoch, "train_seconds": self.train_seconds}

    def _epoch(self, step: int) -> float:
        return step * self._trainer.config.training.epochs / self._total_steps

    def _append(self, line: dict[str, Any]) -> None:
        if self._trainer.worker.is_rank_zero:
            append_line(self._run.journal, line)
