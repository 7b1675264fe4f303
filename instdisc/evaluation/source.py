"""What is evaluated: a run or a snapshot by itself, each part opened when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.snapshots import Snapshot, SnapshotRows, open_snapshot
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import Embedder
from instdisc.runs.run_directory import RunDirectory, load_network, network_settings
from instdisc.settings.model import BackboneConfig
from pipelines.augment import Augmentation
from pipelines.manifest import Manifest

_BLOCK = 65_536  # rows read at a time


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows in memory as a source of rows for `cluster.topk`; picklable."""

    rows: npt.NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        """All of them."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start … stop - 1."""
        return self.rows[start:stop]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenRows:
    """Some rows of the stored bank as a source of rows for `cluster.topk`; picklable.

    Attributes:
        bank: All rows.
        rows: int64 (M,), ascending, those chosen.
    """

    bank: SnapshotRows
    rows: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows number start … stop - 1 of those chosen; raises SnapshotError where a piece is missing or damaged."""
        rows, parts = self.rows[start:stop], []
        while len(rows):
            first = int(rows[0])
            count = int(np.searchsorted(rows, first + _BLOCK))
            parts.append(self.bank.read(first, int(rows[count - 1]) + 1)[rows[:count] - first])
            rows = rows[count:]
        return np.concatenate(parts)


class Source:
    """A run, or a snapshot by itself.

    Args:
        name: A run directory, a folder of snapshots or one snapshot, here or at a URL.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def has_run(self) -> bool:
        """Whether the source is, or lies in, a run directory that can be read here."""
        return self._run is not None

    @property
    def run(self) -> RunDirectory:
        """The run directory; raises ConfigError where only a snapshot is at hand."""
        if self._run is None:
            raise ConfigError(
                f"{self.name} is a snapshot outside its run, and this needs the run's list of images: give "
                "the run directory"
            )
        return self._run

    @cached_property
    def _run(self) -> RunDirectory | None:
        if "://" in self.name:
            return None
        path = Path(self.name).expanduser().absolute()
        for place in (path, path.parent, path.parent.parent):
            run = RunDirectory(place)
            if run.config.exists() and run.manifest.exists():
                return run
        return None

    @cached_property
    def snapshot(self) -> Snapshot:
        """The snapshot named, or the newest one; what is read of it is checked as it is read."""
        source: Path | str = self.name
        if "://" not in self.name:
            source = Path(source).expanduser().absolute()  # actors may work elsewhere
        is_run = self.has_run and source == self.run.path
        return self.run.open_snapshot() if is_run else open_snapshot(source)

    @cached_property
    def own_k(self) -> int | None:
        """The k that the run was told to measure itself with, None if none."""
        return self.run.stored_config()[1].knn.k if self.has_run else None

    @cached_property
    def network(self) -> Embedder:
        """The trained network on the CPU, in evaluation mode."""
        return load_network(self.snapshot)

    @cached_property
    def augmentation(self) -> Augmentation:
        """Size and normalisation that the network was trained with."""
        return network_settings(self.snapshot)[1]

    @property
    def backbone(self) -> BackboneConfig:
        """What the network was built with."""
        return network_settings(self.snapshot)[0]

    @cached_property
    def train(self) -> Manifest:
        """The training images: row = row of the bank."""
        manifest = Manifest.load(self.run.manifest)
        stored = self.snapshot.attributes.get("manifest_fingerprint")
        if len(manifest) != self.snapshot.num_rows or stored not in (None, manifest.fingerprint):
            raise ConfigError(
                f"the snapshot's {self.snapshot.num_rows} rows are not of the {len(manifest)} images listed in "
                f"{self.run.manifest}: name a snapshot of this run"
            )
        return manifest

    @property
    def turns_images(self) -> bool:
        """Whether the images of the bank were turned upright; so must be those that are compared with them."""
        return bool(self.snapshot.attributes.get("upright", False))  # 0.1.0 turned none and did not say so

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the bank's classes, by number; empty without labels."""
        if self.has_run:
            return self.train.class_names
        return tuple(self.snapshot.attributes.get("class_names", ()))

    @property
    def bank_labels(self) -> npt.NDArray[np.int64]:
        """int64 (N,), -1 for a row without a label; raises ConfigError if no row has one."""
        if not self.has_labels:
            raise ConfigError(
                f"the bank of {self.name} has no labels, accuracy needs them: evaluate a run on labelled "
                "images, or choose --protocols that need none"
            )
        return self._labels

    @property
    def has_labels(self) -> bool:
        """Whether any row of the bank has a label."""
        return bool((self._labels >= 0).any())

    @cached_property
    def _labels(self) -> npt.NDArray[np.int64]:
        if "labels" not in self.snapshot.tables:
            return np.full(self.snapshot.num_rows, -1)
        return self.snapshot.read("labels", 0, self.snapshot.num_rows).astype(np.int64)

    def rows(self, chosen: npt.NDArray[np.int64]) -> ChosenRows:
        """Some rows of the bank, int64 (M,), ascending, as they are stored."""
        return ChosenRows(bank=SnapshotRows(self.snapshot, "embeddings"), rows=chosen)

    @property
    def embedding_dim(self) -> int:
        """D, entries of an embedding."""
        return int(self.snapshot.tables["embeddings"][0][1])
