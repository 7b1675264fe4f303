"""What every protocol of an evaluation works with, each part opened when it is first asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from cluster.actors import connect, share_out
from cluster.metrics import Endpoint, Metrics, exported
from cluster.tables import TableRows
from cluster.topk import RowSource, TopK, read_rows
from instdisc.common.errors import ConfigError
from instdisc.common.files import parse_object, read_regular, write_json
from instdisc.common.metrics import EVALUATION
from instdisc.evaluation.images import ImageFunction, ImageRows, embed
from instdisc.evaluation.queries import LabeledQueries, leave_one_out, open_labeled, open_queries
from instdisc.evaluation.reference import Reference
from instdisc.evaluation.source import ArrayRows, Source, WhitenedRows
from instdisc.model import whitening
from instdisc.model.features import mirrored_features
from instdisc.model.voters import Voters, choose_voters
from instdisc.model.whitening import Whitening
from instdisc.settings.evaluation import EvaluationConfig, Readout
from pipelines.augment import Augmentation
from pipelines.manifest import Manifest
from pipelines.scan import progress_bar

_ROWS_AT_A_TIME = 65_536

logger = logging.getLogger(__name__)


class Evaluation:
    """A run, a snapshot or an index, its queries and its bank; a context manager that serves its metrics.

    Errors that a user can fix are raised where they occur: `ConfigError`, `DataError`, `ClusterError`.

    Args:
        config: Settings.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.source = Source(config.source)
        self._open = contextlib.ExitStack()
        self._endpoint: Endpoint | None = None
        self._others: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None = None
        self._voters_found: dict[Readout, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = {}

    def __enter__(self) -> Self:
        _ = self.source.snapshot  # that there is none is told before a cluster is asked for
        self._open.enter_context(connect(self.config.actors))
        if self.source.has_run:
            place = self.source.run.targets
            self._endpoint = self._open.enter_context(
                exported(self.metrics, self.config.metrics, local_rank=0, world_size=1, directory=place)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._endpoint is not None and error is None:
            self._endpoint.wait_until_read()
        self._open.close()

    @cached_property
    def metrics(self) -> Metrics:
        """This job's metrics for Prometheus, under the name of the run."""
        name = (
            self.source.run.path.name
            if self.source.has_run and self.source.index is None
            else self.config.source.rstrip("/").rpartition("/")[2]
        )
        return Metrics(EVALUATION, run=name, rank=0)

    @cached_property
    def output(self) -> Path:
        """Where the results go; exists."""
        path = self.config.output
        if path is None:
            base = (
                self.source.run.path / "evaluation"
                if self.source.has_run and self.source.index is None
                else Path("evaluation", self.metrics.run)
            )
            step = f"step-{self.source.snapshot.step:09d}"
            path = base if base.name == step else base / step
        path = path.expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {path} ({error}): choose another --output") from error
        return path

    @cached_property
    def queries(self) -> LabeledQueries:
        """The labeled queries: those named, else the run's test images, else bank rows, each against the others."""
        queries = self._open_queries()
        logger.info("%d queries (%s)", len(queries), queries.kind)
        return queries

    def _open_queries(self) -> LabeledQueries:
        config = self.config.queries
        if config.path is None and config.labels is not None:
            raise ConfigError("--queries.labels is for --queries.path with embeddings: name them")
        if config.path is None and self.source.test_images is None:
            return leave_one_out(self.source, self.reference, self.compute, self.config.max_rows)
        return open_queries(self.source, self.reference, self.compute, config)

    @cached_property
    def reference(self) -> Reference:
        """The labeled images that queries are compared with: those named, else those of the run or index."""
        config = self.config.reference
        if config.path is None:
            return Reference(
                self.source.bank_labels, self.source.class_names, lambda: self.source.train, stored=True
            )
        images = open_labeled(config.path, config, "--reference.path", upright=self.source.turns_images)
        if not images.has_labels:
            raise ConfigError(f"--reference.path: no image of {images.root} has a label: give labeled images")
        return Reference(
            np.asarray(images.labels, np.int64), images.class_names, lambda: images, stored=False
        )

    @property
    def has_labels(self) -> bool:
        """Whether there are labeled images to compare queries with."""
        return self.config.reference.path is not None or self.source.has_labels

    @property
    def recomputes(self) -> bool:
        """Whether the network embeds what the queries are compared with."""
        return self.config.recompute or self.config.reference.path is not None

    @cached_property
    def voters(self) -> Voters:
        """The labeled rows that classify the queries; a sample of them if they are many and to be recomputed."""
        voters = choose_voters(
            self.reference.labels,
            leave_one_out=self.queries.kind == "leave-one-out",
            max_rows=self.config.max_rows if self.recomputes else 0,
        )
        labeled = int((self.reference.labels >= 0).sum())
        logger.info(
            "compared with %s%d labeled rows, %s",
            f"{len(voters)} drawn from the " if len(voters) < labeled else "",
            labeled,
            self.rows_are,
        )
        return voters

    @property
    def rows_are(self) -> str:
        """What the queries are compared with, in a word or two."""
        if self.config.reference.path is not None:
            return "reference"
        if self.config.recompute:
            return "recomputed"
        return "stored" if self.source.index is None else "indexed"

    @property
    def can_whiten(self) -> bool:
        """Whether the rows that are compared with are embeddings of one network, which whitening is for."""
        return self.recomputes or self.source.index is not None

    def neighbors(
        self, k: int, readout: Readout = "plain"
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The k nearest labeled rows of each of `queries` that may vote for it.

        What was found is kept, so that asking for fewer costs nothing.

        Args:
            k: How many.
            readout: `whitened` is for recomputed rows, from which the whitening is fitted, and for those of an index,
                which holds one.

        Returns:
            Scores float32 (Q, at most k), largest first, and positions among `voters`, int64; minus infinity and -1
            where fewer may vote.
        """
        queries, voters = self.queries, self.voters
        searched = voters.searched(k)
        if readout not in self._voters_found or self._voters_found[readout][0].shape[1] < searched:
            rows, embeddings = self._voting_rows, queries.embeddings
            if readout == "features":
                assert queries.manifest is not None  # vectors alone have none
                rows, embeddings = _whitened(
                    self.compute(self.reference.images, mirrored_features, voters.rows),
                    self.compute(queries.manifest, mirrored_features, queries.rows),
                )
            elif readout == "whitened" and self.recomputes:
                rows, embeddings = _whitened(self._recomputed.rows, embeddings)
            elif readout == "whitened":
                rows, embeddings = _whitened_by(self._whitening, rows, embeddings)
            with TopK(rows, self.config.actors, self.metrics) as top_k:
                self._voters_found[readout] = top_k.search(embeddings, searched)
        scores, found = (torch.from_numpy(each[:, :searched]) for each in self._voters_found[readout])
        asking = None
        if voters.leave_one_out:
            asking = torch.from_numpy(np.searchsorted(voters.rows, queries.rows))
        scores, found = voters.voting(scores, found, asking, k)
        return scores.numpy(), found.numpy()

    @cached_property
    def _whitening(self) -> Whitening:
        found = self.source.whitening
        assert found is not None  # nothing else is asked for
        return found

    @property
    def _voting_rows(self) -> RowSource:
        return self._recomputed if self.recomputes else self.source.rows(self.voters.rows)

    @cached_property
    def _recomputed(self) -> ArrayRows:
        """The voters as the network embeds them; NaN for one that cannot be decoded."""
        return ArrayRows(self.compute(self.reference.images, rows=self.voters.rows))

    @cached_property
    def _all_features(self) -> npt.NDArray[np.float32]:
        return self.compute(self.source.train, mirrored_features)

    @cached_property
    def _all_recomputed(self) -> npt.NDArray[np.float32]:
        return self.compute(self.source.train)

    @property
    def compared_rows(self) -> RowSource:
        """All rows, as they are stored or, with --recompute, as the network embeds the images now."""
        if self.config.recompute:
            return ArrayRows(self._all_recomputed)
        return TableRows(self.source.snapshot, "embeddings")

    def nearest_others(self, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The k most similar other rows of every row; what was found is kept, so that asking for fewer costs nothing.

        Returns:
            Scores float32 (N, at most k), largest first, and rows, int64; minus infinity and -1 where there are no
            more, and throughout for an image that cannot be decoded.

        Raises:
            ConfigError: There is only one row.
        """
        rows = self.compared_rows
        if rows.num_rows < 2:
            raise ConfigError("there is only one image, which has no others to be compared with: embed more")
        k = min(k, rows.num_rows - 1)
        if self._others is None or self._others[0].shape[1] < k:
            scores = np.full((rows.num_rows, k), -np.inf, np.float32)
            found = np.full((rows.num_rows, k), -1, np.int64)
            with (
                TopK(rows, self.config.actors, self.metrics) as top_k,
                progress_bar(True, rows.num_rows, " images compared") as bar,
            ):
                for start in range(0, rows.num_rows, _ROWS_AT_A_TIME):
                    stop = min(start + _ROWS_AT_A_TIME, rows.num_rows)
                    block = rows.read(start, stop).astype(np.float32, copy=False)
                    own = start + np.flatnonzero(np.isfinite(block[:, 0]))
                    scores[own], found[own] = top_k.search(block[own - start], k, excluded=own)
                    bar.update(stop - start)
            self._others = scores, found
        return self._others[0][:, :k], self._others[1][:, :k]

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        readout: Readout = "plain",
        among: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The exact k nearest rows of the bank, labeled or not.

        Args:
            queries: float32 (Q, D), or for the read-out `features` what `mirrored_features` makes of them.
            k: Neighbors per query.
            readout: `whitened` embeds all training images first, since the stored rows are of many steps; `features`
                computes those of all.
            among: int64 (M,), ascending, the rows to compare with; all by default.

        Returns:
            Scores float32 (Q, k), largest first, and rows, or positions in `among`, int64 (Q, k); see
            `cluster.topk.TopK.search`.

        Raises:
            ConfigError: K beyond the bank.
        """
        num_rows = self.source.snapshot.num_rows
        if k > num_rows:
            raise ConfigError(f"k is {k}, but a query has only {num_rows} rows to compare with: lower --k")
        bank: RowSource = TableRows(self.source.snapshot, "embeddings")
        if among is not None:
            bank = self.source.rows(among)
        if readout == "features":
            whitened, queries = _whitened(self._all_features, queries)
            bank = whitened if among is None else ArrayRows(whitened.rows[among])
        elif readout == "whitened" and self.source.index is not None:
            bank, queries = _whitened_by(self._whitening, bank, queries)
        elif readout == "whitened":
            whitened, queries = _whitened(self._all_recomputed, queries)
            bank = whitened if among is None else ArrayRows(whitened.rows[among])
        with TopK(bank, self.config.actors, self.metrics) as top_k:
            return top_k.search(queries, k)

    def image_rows(
        self, manifest: Manifest, function: ImageFunction, augmentation: Augmentation | None = None
    ) -> ImageRows:
        """A table with a row for every image, computed by the trained network as it is read.

        Args:
            manifest: Where the images are.
            function: What to compute.
            augmentation: Size and normalization of the images; by default those of the network.
        """
        return ImageRows(
            manifest=manifest,
            network=self.source.network,
            function=function,
            augmentation=augmentation or self.source.augmentation,
            loader=self.config.loader,
        )

    def compute(
        self,
        manifest: Manifest,
        function: ImageFunction = embed,
        rows: npt.NDArray[np.int64] | None = None,
        augmentation: Augmentation | None = None,
    ) -> npt.NDArray[np.float32]:
        """Apply a function of network and images to images, in the actors where there are any.

        Args:
            manifest: Where the images are.
            function: By default the unit embeddings; features of stages are functions of the same kind.
            rows: int64 (R,), which images; all by default.
            augmentation: As of `image_rows`.

        Returns:
            float32 (R, F); a row of NaN for an image that cannot be decoded.
        """
        chosen = manifest if rows is None else manifest.select(rows)
        return read_rows(self.image_rows(chosen, function, augmentation), self.config.actors)

    def share_out(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        """`cluster.actors.share_out` to processes of the size of the actors."""
        return share_out(function, shared, items, self.config.actors)

    def write(self, name: str, values: dict[str, Any]) -> Path:
        """Write `output/NAME.json`, atomically, with the identity of the snapshot."""
        path = self.output / f"{name}.json"
        write_json(path, {**self._snapshot_identity, **values})
        return path

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written under the name for this snapshot, by whichever evaluation; None if nothing was."""
        try:
            values = parse_object(read_regular(self.output / f"{name}.json"))
        except OSError:
            return None
        ours = self._snapshot_identity
        return values if values is not None and ours == {key: values.get(key) for key in ours} else None

    @property
    def _snapshot_identity(self) -> dict[str, Any]:
        return dict(self.source.snapshot.identity)


def _whitened(
    rows: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]
) -> tuple[ArrayRows, npt.NDArray[np.float32]]:
    """Rows and queries, whitened by what the rows that are there are like."""
    table = torch.from_numpy(rows)
    whiten = whitening.fit(table[table[:, 0].isfinite()])
    return ArrayRows(whiten(table).numpy()), whiten(torch.from_numpy(queries)).numpy()


def _whitened_by(
    whiten: Whitening, rows: RowSource, queries: npt.NDArray[np.float32]
) -> tuple[WhitenedRows, npt.NDArray[np.float32]]:
    return WhitenedRows(rows, whiten), whiten(torch.from_numpy(queries)).numpy()


ProtocolFunction = Callable[[Evaluation, Any], dict[str, Any]]
"""Called with the evaluation and the protocol's own settings. Returns the JSON values of `output/NAME.json`; `summary`
among them holds the figures of the printed table, by name: shares of 1, or other numbers."""
