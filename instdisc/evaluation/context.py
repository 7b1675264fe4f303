"""What every protocol of an evaluation works with, each part opened when it is first asked for."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import tyro

from cluster.actors import ActorsConfig, connect, share_out
from cluster.metrics import EVALUATION, Endpoint, Metrics, MetricsConfig, exported
from cluster.snapshots import Snapshot, SnapshotRows, open_snapshot
from cluster.topk import RowSource, TopK, read_rows
from instdisc.common.errors import ConfigError
from instdisc.evaluation.images import ImageFunction, ImageRows, embed
from instdisc.evaluation.queries import Queries, QueryConfig, leave_one_out, open_queries
from instdisc.model.backbone import Embedder
from instdisc.runs.run_directory import RunDirectory, load_network, network_settings, write_json
from pipelines.augment import Augmentation
from pipelines.loader import LoaderConfig
from pipelines.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, on what, and where."""

    source: Annotated[str, tyro.conf.Positional]
    """A run directory, a folder of snapshots or one snapshot, here or at a URL."""
    queries: QueryConfig = field(default_factory=QueryConfig)
    recompute: bool = False
    """Compare with fresh embeddings of the training images instead of those stored while training."""
    actors: Annotated[ActorsConfig, tyro.conf.arg(name="")] = field(default_factory=ActorsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: Path | None = None
    """Where the results go; RUN/evaluation/step-… by default, evaluation/NAME/step-… for a snapshot by itself."""


class Evaluation:
    """A run or a snapshot, its queries and its bank; a context manager that ends the actors it started.

    Errors that a user can put right are raised by the part that meets them: `ConfigError`, `DataError`, `ClusterError`.

    Args:
        config: Settings.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self._open = contextlib.ExitStack()
        self._endpoint: Endpoint | None = None
        self._top_k: TopK | None = None
        self._neighbours: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None = None

    def __enter__(self) -> Self:
        self._open.enter_context(connect(self.config.actors))
        self._open.callback(self._release)
        if self.has_run:
            place = self.run.targets
            self._endpoint = self._open.enter_context(
                exported(self.metrics, self.config.metrics, local_rank=0, world_size=1, directory=place)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        if self._endpoint is not None and error is None:
            self._endpoint.wait_until_read()
        self._open.close()

    @cached_property
    def metrics(self) -> Metrics:
        """What this job tells Prometheus, under the name of the run."""
        name = self.run.path.name if self.has_run else self.config.source.rstrip("/").rpartition("/")[2]
        return Metrics(EVALUATION, run=name, rank=0)

    @cached_property
    def has_run(self) -> bool:
        """Whether the source is, or lies in, a run directory that can be read here."""
        return self._run is not None

    @property
    def run(self) -> RunDirectory:
        """The run directory; raises ConfigError where only a snapshot is at hand."""
        if self._run is None:
            raise ConfigError(
                f"{self.config.source} is a snapshot outside of its run: this needs the run's list of images, so give "
                "the run directory"
            )
        return self._run

    @cached_property
    def _run(self) -> RunDirectory | None:
        if "://" in self.config.source:
            return None
        path = Path(self.config.source).expanduser().absolute()
        for place in (path, path.parent, path.parent.parent):
            run = RunDirectory(place)
            if run.config.exists() and run.manifest.exists():
                return run
        return None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the network was built with: see `instdisc.runs.run_directory.network_settings`."""
        return network_settings(self.snapshot)

    @cached_property
    def snapshot(self) -> Snapshot:
        """The snapshot named, or the newest one; what is read of it is checked as it is read."""
        source: Path | str = self.config.source
        if "://" not in self.config.source:
            source = Path(source).expanduser().absolute()  # actors may work elsewhere
        is_run = self.has_run and source == self.run.path
        return self.run.open_snapshot() if is_run else open_snapshot(source)

    @cached_property
    def output(self) -> Path:
        """Where the results go; exists."""
        path = self.config.output
        if path is None:
            base = self.run.path / "evaluation" if self.has_run else Path("evaluation", self.metrics.run)
            step = f"step-{self.snapshot.step:09d}"
            path = base if base.name == step else base / step
        path = path.expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {path} ({error}): choose another --output") from error
        return path

    @cached_property
    def network(self) -> Embedder:
        """The trained network on the CPU, in evaluation mode."""
        return load_network(self.snapshot)

    @cached_property
    def augmentation(self) -> Augmentation:
        """Size and normalisation that the network was trained with."""
        values = self.settings["augmentation"]
        fields: Any = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return Augmentation(**fields)

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

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the bank's classes, by number; empty without labels."""
        if self.has_run:
            return self.train.class_names
        return tuple(self.snapshot.attributes.get("class_names", ()))

    @cached_property
    def bank_labels(self) -> npt.NDArray[np.int64]:
        """int64 (N,), -1 for a row without a label; raises ConfigError if no row has one."""
        labels = None
        if "labels" in self.snapshot.tables:
            labels = self.snapshot.read("labels", 0, self.snapshot.num_rows).astype(np.int64)
        if labels is None or not (labels >= 0).any():
            raise ConfigError(
                f"the bank of {self.config.source} has no labels, accuracy needs them: evaluate a run on labelled "
                "images, or choose --protocols that need none"
            )
        return labels

    @cached_property
    def bank(self) -> RowSource:
        """The rows that queries are compared with, stored or re-computed; read in the actors, never whole here."""
        if self.config.recompute:
            return self.image_rows(self.train, embed)
        return SnapshotRows(self.snapshot, "embeddings")

    @property
    def embedding_dim(self) -> int:
        """D, entries of an embedding."""
        return int(self.snapshot.tables["embeddings"][0][1])

    @cached_property
    def queries(self) -> Queries:
        """The labelled queries: those named, else the run's test images, else bank rows, each against the others."""
        queries = self._open_queries()
        logger.info(
            "%d queries (%s), compared with %d %s rows",
            len(queries),
            queries.kind,
            self.snapshot.num_rows,
            "re-computed" if self.config.recompute else "stored",
        )
        return queries

    def _open_queries(self) -> Queries:
        config = self.config.queries
        if config.path is None and config.labels is not None:
            raise ConfigError("--queries.labels is for --queries.path with embeddings: name them")
        if config.path is None and not (self.has_run and self.run.test_manifest.exists()):
            return leave_one_out(self)
        return open_queries(self, config)

    def neighbours(self, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """`search` for the k nearest rows of `queries`; kept, so that asking for fewer costs nothing."""
        if self._neighbours is None or self._neighbours[0].shape[1] < k:
            queries = self.queries
            self._neighbours = self.search(queries.embeddings, k, queries.excluded)
        scores, rows = self._neighbours
        return scores[:, :k], rows[:, :k]

    def search(
        self, queries: npt.NDArray[np.float32], k: int, excluded: npt.NDArray[np.int64] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The exact k nearest rows of the bank.

        Args:
            queries: float32 (Q, D).
            k: Neighbours per query.
            excluded: int64 (Q,), a row that does not count for the query, negative for none.

        Returns:
            Scores float32 (Q, k), largest first, and rows int64 (Q, k); see `cluster.topk.TopK.search`.

        Raises:
            ConfigError: K beyond the bank.
        """
        others = self.snapshot.num_rows - (excluded is not None)
        if k > others:
            raise ConfigError(f"k is {k}, but a query has only {others} rows to compare with: lower --k")
        if self._top_k is None:
            self._top_k = TopK(self.bank, self.config.actors, self.metrics)
        return self._top_k.search(queries, k, excluded=excluded)

    def _release(self) -> None:
        """End the actors that hold the bank, who would keep others waiting for their CPUs."""
        if self._top_k is not None:
            self._top_k.close()
            self._top_k = None

    def image_rows(self, manifest: Manifest, function: ImageFunction) -> ImageRows:
        """A table with a row for every image, computed by the trained network as it is read."""
        return ImageRows(
            manifest=manifest,
            network=self.network,
            function=function,
            augmentation=self.augmentation,
            loader=self.config.loader,
        )

    def compute(
        self,
        manifest: Manifest,
        function: ImageFunction = embed,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Apply a function of network and images to images, in the actors where there are any.

        Args:
            manifest: Where the images are.
            function: By default the unit embeddings; features of stages are functions of the same kind.
            rows: int64 (R,), which images; all by default.

        Returns:
            float32 (R, F); a row of NaN for an image that cannot be decoded.
        """
        self._release()
        chosen = manifest if rows is None else manifest.select(rows)
        return read_rows(self.image_rows(chosen, function), self.config.actors)

    def share_out(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        """`cluster.actors.share_out` to processes of the size of the actors, which are ended first."""
        self._release()
        return share_out(function, shared, items, self.config.actors)

    def write(self, name: str, values: dict[str, Any]) -> Path:
        """Write `output/NAME.json`, whole or not at all, with what tells of which snapshot it is."""
        path = self.output / f"{name}.json"
        write_json(path, {**self._snapshot_identity, **values})
        return path

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written under the name for this snapshot, by whichever evaluation; None if nothing was."""
        try:
            values: dict[str, Any] = json.loads((self.output / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        ours = self._snapshot_identity
        return values if ours == {key: values.get(key) for key in ours} else None

    @property
    def _snapshot_identity(self) -> dict[str, Any]:
        return {"step": self.snapshot.step, "attempt": self.snapshot.document["attempt"]}


Protocol = Callable[[Evaluation, Any], dict[str, Any]]
"""Called with the evaluation and the protocol's own settings. Returns the JSON values of `output/NAME.json`; `summary`
among them holds the figures of the printed table, by name: shares of 1, or other numbers."""
