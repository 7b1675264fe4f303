"""What a snapshot of a run holds, and how training resumes from it, with any number of ranks.

Tables, partitioned as the bank is: `embeddings`, `labels`, `keys`, and those of the objective. Files: the network, with
batch statistics averaged over the ranks, the optimizer, and for every rank its own statistics. Attributes: the
progress of training, and what identifies the run. The random numbers of a step are functions of the seed and the step,
so none of their state is kept, and neither is that of the loader.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.errors import SnapshotError
from cluster.snapshot_writer import SnapshotReport, SnapshotWriter
from cluster.snapshots import Snapshot, newest_step, open_snapshot, step_folder
from cluster.storage import Storage
from instdisc.common.errors import ConfigError
from instdisc.model.sgd import SkippingSGD
from instdisc.runs.network import NETWORK, NETWORK_SETTINGS
from instdisc.settings.run import RunConfig
from instdisc.settings.schema import SCHEMA
from instdisc.training.trainer import Trainer
from pipelines.manifest import Manifest
from pipelines.strings import printable

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer.safetensors"
_POLL_S = 0.2
_ROWS_READ_AT_A_TIME = 1 << 18


@dataclass
class TrainingProgress:
    """How far training is, beside what the trainer knows.

    Attributes:
        train_seconds: Spent in steps.
        means: Of the last step.
    """

    train_seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)


class RunSnapshots:
    """Saves this rank's part of a run, and restores it.

    Args:
        trainer: What is saved and restored.
        manifest: The training images.
        config: Settings.
        url: Directory of the snapshots.
        run_id: Tells this run from others with the same settings.
        best: Which of some steps to keep besides the newest; by default none.

    Collectives: one all-reduce; every rank must call.
    """

    def __init__(
        self,
        trainer: Trainer,
        manifest: Manifest,
        config: RunConfig,
        url: str | Path,
        run_id: str | None,
        best: Callable[[Sequence[int]], int | None] = lambda steps: None,
    ) -> None:
        self._trainer, self._manifest, self._config, self._url = trainer, manifest, config, url
        self._run_id = run_id
        rank = trainer.worker.rank
        bits = int.from_bytes(np.random.default_rng().bytes(7)) if rank == 0 else 0
        attempt = int(trainer.exchange.sum(torch.tensor(bits, device=trainer.worker.device)))
        self._writer = SnapshotWriter(
            url, trainer.partition, rank, f"attempt-{attempt:x}", keep=config.snapshots.keep, best=best
        )
        start, stop = trainer.bank.start, trainer.bank.stop
        self._images: dict[str, Any] = {
            "labels": np.asarray(manifest.labels[start:stop], dtype=np.int32),
            "keys": np.array(
                [printable(manifest.keys[row]) for row in range(start, stop)], dtype=np.dtypes.StringDType()
            ),
        }
        self.committed_step, self.committed_time = 0, time.time()
        self.seconds: float | None = None
        """How long the newest snapshot took to write, as far as rank 0 knows."""

    def restore(self) -> TrainingProgress | None:
        """Restore the trainer from the newest snapshot; None if there is none.

        Raises:
            ConfigError: It was taken of other images or of another network.
            SnapshotError: It is damaged.

        Collectives: one all-reduce; every rank must call.
        """
        trainer = self._trainer
        newest = (newest_step(self._url) if trainer.worker.is_rank_zero else 0) or 0
        step = int(trainer.exchange.sum(torch.tensor(newest, device=trainer.worker.device)))
        if not step:
            return None
        try:
            return self._restore(open_snapshot(Storage.at(self._url).below(step_folder(step)).url))
        except SnapshotError as error:
            raise SnapshotError(
                f"{error}. To resume from the snapshot before it, move {step_folder(step)} away and run the same "
                "command again"
            ) from error

    def _restore(self, snapshot: Snapshot) -> TrainingProgress:
        trainer, noted = self._trainer, snapshot.attributes
        self._check(noted)
        start, stop = trainer.bank.start, trainer.bank.stop
        for name, rows in {"embeddings": trainer.bank.rows, **trainer.objective.tables()}.items():
            for first in range(start, stop, _ROWS_READ_AT_A_TIME):
                last = min(first + _ROWS_READ_AT_A_TIME, stop)
                rows[first - start : last - start] = torch.from_numpy(snapshot.read(name, first, last))
        network = _load(snapshot, NETWORK)
        if noted["world_size"] == trainer.worker.world_size:
            network |= _load(snapshot, _statistics(trainer.worker.rank))
        trainer.embedder.backbone.load_state_dict(network)
        _restore_optimizer(trainer.optimizer, _load(snapshot, _OPTIMIZER))
        trainer.objective.load_state_dict(noted["objective"])
        trainer.steps = self.committed_step = snapshot.step
        self.committed_time, self.seconds = snapshot.time, snapshot.seconds
        return TrainingProgress(noted["train_seconds"], noted["means"])

    def _check(self, noted: dict[str, Any]) -> None:
        """Refuse a snapshot that is not of this run."""
        for name, ours in self._identity().items():
            if noted.get(name) != ours:
                raise ConfigError(
                    f"the snapshots in {self._url} belong to a run whose {name.replace('_', ' ')} is "
                    f"{noted.get(name)!r}, this run's is {ours!r}: choose another --run-dir or "
                    "--snapshots.url, or start over with --overwrite"
                )

    def _identity(self) -> dict[str, Any]:
        config = self._config
        return {
            "num_instances": len(self._manifest),
            "manifest_fingerprint": self._manifest.fingerprint,
            "backbone": config.backbone.name,
            "embedding_dim": config.backbone.embedding_dim,
            "bank_dtype": config.bank.dtype,
            "objective_name": type(config.objective).__name__,
            "run_id": self._run_id,
        }

    def save(self, progress: TrainingProgress) -> bool:
        """Copy this rank's part and start writing it; returns while it is being written. All steps have been read.

        Returns:
            The same on all ranks: false if nothing was done, as the last one is still being written on some rank.

        Collectives: two all-reduces; every rank must call.
        """
        trainer, config = self._trainer, self._config
        if self._busy():
            return False
        statistics = trainer.buffers.statistics()
        averaged = trainer.buffers.averaged_statistics()
        files = {_statistics(trainer.worker.rank): save(statistics)}
        if trainer.worker.is_rank_zero:
            files[NETWORK] = save(_on_cpu(trainer.embedder.backbone.state_dict()) | averaged)
            files[_OPTIMIZER] = save(_optimizer_tensors(trainer.optimizer))
        settings = config.settings()
        epoch = trainer.steps / max(len(self._manifest) // config.training.batch_size, 1)
        attributes = {
            **self._identity(),
            "step": trainer.steps,
            "epoch": epoch,
            "temperature": config.objective.temperature,
            "settings": {"schema": SCHEMA, **{name: settings[name] for name in NETWORK_SETTINGS}},
            "class_names": list(self._manifest.class_names),
            "upright": self._manifest.upright,
            "world_size": trainer.worker.world_size,
            "seed": config.training.seed,
            "objective": trainer.objective.state_dict(),
            "train_seconds": progress.train_seconds,
            "means": progress.means,
        }
        tables = {"embeddings": trainer.bank.rows, **self._images, **trainer.objective.tables()}
        self._writer.save(trainer.steps, tables, files, attributes)
        return True

    def _busy(self) -> bool:
        """Whether some rank is still writing.

        Collectives: one all-reduce; every rank must call.
        """
        busy = torch.tensor(float(self._writer.busy), device=self._trainer.worker.device)
        return bool(self._trainer.exchange.sum(busy) > 0)

    def is_saved(self) -> bool:
        """Whether the current step is committed.

        Collectives: one all-reduce; every rank must call.
        """
        # Only rank 0 knows: the others know of their own part alone.
        saved = self._trainer.worker.is_rank_zero and self.committed_step == self._trainer.steps > 0
        flag = torch.tensor(float(saved), device=self._trainer.worker.device)
        return bool(self._trainer.exchange.sum(flag) > 0)

    def poll(self) -> list[SnapshotReport]:
        """The reports of the snapshots that finished since the last call."""
        reports = self._writer.poll()
        for report in reports:
            if not report.error:
                self.committed_step, self.seconds = report.step, report.seconds
        return reports

    def wait(self) -> list[SnapshotReport]:
        """Wait for what is being written; returns its reports.

        Collectives: all-reduces until all ranks are done, so that no time limit of a collective is reached; every rank
        must call.
        """
        while self._busy():
            time.sleep(_POLL_S)
        return self.poll()

    def abandon(self) -> None:
        """Stop waiting for other ranks; an unfinished snapshot may be left uncommitted."""
        self._writer.close(0)


def _load(snapshot: Snapshot, name: str) -> dict[str, Tensor]:
    try:
        return load(snapshot.read_file(name))
    except SafetensorError as error:
        raise ConfigError(
            f"{snapshot.url}: {name} is not in the safetensors format ({error}): name an earlier snapshot, or start "
            "over with --overwrite"
        ) from error


def _statistics(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _optimizer_tensors(optimizer: SkippingSGD) -> dict[str, Tensor]:
    """The optimizer's state as `INDEX OF THE PARAMETER.NAME`."""
    parameters = enumerate(optimizer.parameters())
    return _on_cpu(
        {f"{i}.{name}": value for i, each in parameters for name, value in optimizer.state[each].items()}
    )


def _restore_optimizer(optimizer: SkippingSGD, tensors: dict[str, Tensor]) -> None:
    optimizer.load_momentum({int(key.partition(".")[0]): value for key, value in tensors.items()})
