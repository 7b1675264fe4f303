"""What is evaluated: a run, a snapshot by itself or an index, each part opened when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.collection import Collection, is_collection, open_collection
from cluster.snapshots import open_snapshot
from cluster.tables import TableRows, Tables
from cluster.topk import RowSource
from instdisc.common.errors import ConfigError
from instdisc.index.images import manifest_of
from instdisc.index.model import ATTRIBUTE
from instdisc.index.readout import read_whitening
from instdisc.model.backbone import Embedder
from instdisc.model.whitening import Whitening
from instdisc.runs.network import load_network, network_settings
from instdisc.runs.run_directory import RunDirectory
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

    bank: TableRows
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


@dataclass(frozen=True, eq=False)
class WhitenedRows:
    """Whitened rows of a source, as a source; picklable."""

    source: RowSource
    whitening: Whitening

    @property
    def num_rows(self) -> int:
        """As many as there are."""
        return self.source.num_rows

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start … stop - 1."""
        rows = self.source.read(start, stop).astype(np.float32, copy=False)
        return np.asarray(self.whitening(torch.from_numpy(rows)).numpy())


class Source:
    """A run, a snapshot by itself, or an index.

    Args:
        name: A run directory, a folder of snapshots, one snapshot or an index, here or at a URL.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def has_run(self) -> bool:
        """Whether the source is, or lies in, a run directory that can be read here, or is an index of such a run."""
        return self._run is not None

    @property
    def run(self) -> RunDirectory:
        """The run directory; raises ConfigError where only a snapshot or an index is at hand."""
        if self._run is None and self.index is not None:
            noted = self.index.attributes["run_path"]
            raise ConfigError(
                f"the run of the index {self.name} is not at {noted or 'hand'}, and this needs it"
            )
        if self._run is None:
            raise ConfigError(
                f"{self.name} is a snapshot outside its run, and this needs the run's list of images: give "
                "the run directory"
            )
        return self._run

    @cached_property
    def _run(self) -> RunDirectory | None:
        if self.index is not None:
            return _run_of(self.index)
        if "://" in self.name:
            return None
        path = Path(self.name).expanduser().absolute()
        for place in (path, path.parent, path.parent.parent):
            run = RunDirectory(place)
            if run.config.exists() and run.manifest.exists():
                return run
        return None

    @cached_property
    def _place(self) -> Path | str:
        return self.name if "://" in self.name else Path(self.name).expanduser().absolute()

    @cached_property
    def index(self) -> Collection | None:
        """The index in its current state; None where the source is none."""
        return open_collection(self._place) if is_collection(self._place) else None

    @cached_property
    def snapshot(self) -> Tables:
        """The index, the snapshot named, or the newest one; what is read of it is checked as it is read."""
        if self.index is not None:
            return self.index
        is_run = self.has_run and self._place == self.run.path
        return self.run.open_snapshot() if is_run else open_snapshot(self._place)  # actors may work elsewhere

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
        """Size and normalization that the network was trained with."""
        return network_settings(self.snapshot)[1]

    @property
    def backbone(self) -> BackboneConfig:
        """What the network was built with."""
        return network_settings(self.snapshot)[0]

    @cached_property
    def train(self) -> Manifest:
        """The training images, or those of the index: row = row of the bank."""
        if self.index is not None:
            return manifest_of(self.index)
        manifest = Manifest.load(self.run.manifest)
        stored = self.snapshot.attributes.get("manifest_fingerprint")
        if len(manifest) != self.snapshot.num_rows or stored not in (None, manifest.fingerprint):
            raise ConfigError(
                f"the snapshot's {self.snapshot.num_rows} rows are not of the {len(manifest)} images listed in "
                f"{self.run.manifest}: name a snapshot of this run"
            )
        return manifest

    @property
    def has_images(self) -> bool:
        """Whether it is known where the images are."""
        return self.index is not None or self.has_run

    def images(self, rows: npt.NDArray[np.int64]) -> Manifest:
        """Some of the images, int64 (M,), in that order; raises ConfigError where only a snapshot is at hand."""
        return self.train.select(rows) if self.index is None else manifest_of(self.index, rows)

    @property
    def whitening(self) -> Whitening | None:
        """What whitens the rows as they are stored; None where those are averages, which whitening harms."""
        return None if self.index is None else read_whitening(self.index)

    @property
    def test_images(self) -> Path | None:
        """Where the run's test images are listed; None where there are none, or the index is of other images."""
        if not self.has_run or not (self.index is None or self.index.attributes["of_run"]):
            return None
        return self.run.test_manifest if self.run.test_manifest.exists() else None

    @property
    def turns_images(self) -> bool:
        """Whether the images of the bank were turned upright; so must be those that are compared with them."""
        return bool(self.snapshot.attributes.get("upright", False))  # 0.1.0 turned none and did not say so

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the bank's classes, by number; empty without labels."""
        if self.has_run and self.index is None:
            return self.train.class_names
        return tuple(self.snapshot.attributes.get("class_names", ()))

    @property
    def bank_labels(self) -> npt.NDArray[np.int64]:
        """int64 (N,), -1 for a row without a label; raises ConfigError if no row has one."""
        if not self.has_labels:
            raise ConfigError(
                f"the bank of {self.name} has no labels, accuracy needs them: evaluate a run on labeled "
                "images, or choose --protocols that need none"
            )
        return self.labels

    @property
    def has_labels(self) -> bool:
        """Whether any row of the bank has a label."""
        return bool((self.labels >= 0).any())

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 (N,), -1 for a row without a label."""
        if "labels" not in self.snapshot.tables:
            return np.full(self.snapshot.num_rows, -1)
        return self.snapshot.read("labels", 0, self.snapshot.num_rows).astype(np.int64)

    def rows(self, chosen: npt.NDArray[np.int64]) -> ChosenRows:
        """Some rows of the bank, int64 (M,), ascending, as they are stored."""
        return ChosenRows(bank=TableRows(self.snapshot, "embeddings"), rows=chosen)

    def read_rows(self, table: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Some rows of a table, int64 (M,), in any order."""
        if self.index is not None:
            return self.index.read_rows(table, rows)
        once, places = np.unique(rows, return_inverse=True)
        read = ChosenRows(bank=TableRows(self.snapshot, table), rows=once).read(0, len(once))
        return read[places]

    @property
    def embedding_dim(self) -> int:
        """D, entries of an embedding."""
        return int(self.snapshot.tables["embeddings"][0][1])


def _run_of(index: Collection) -> RunDirectory | None:
    """The run whose network an index holds, if it is still where it was."""
    noted = index.attributes["run_path"]
    if noted is None:
        return None
    run = RunDirectory(Path(noted))
    try:
        same = run.settings().get("run_id", "") == index.attributes[ATTRIBUTE]["run"]
    except ConfigError:
        return None
    return run if same and run.manifest.exists() else None
