"""Weighted kNN accuracy with the bank or with recomputed embeddings, which stay on their ranks."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.group import Worker
from instdisc.common.classes import labels_among
from instdisc.model import whitening
from instdisc.model.voters import Voters, choose_voters
from instdisc.model.votes import Accuracy, count_hits, nearest, shard_top_k
from instdisc.settings.run import KnnMonitorConfig
from instdisc.training.trainer import Trainer
from pipelines.loader import Batch, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request

_QUERIES_AT_A_TIME = 256  # per rank
_COARSE_SIDE = 16
_MOST_CHOOSING = 1000  # training images by which the read-out is chosen
RAW_PIXELS = "raw_pixels"
"""Name of the baseline."""
FEATURES = "features"
"""Name of the read-out by the last stage."""

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]


class MeasurementStopped(Exception):  # noqa: N818 - not an error: the stop was requested
    """A measurement was abandoned because the group was asked to stop; raised on all ranks, with the reason."""


def coarse_pixels(pixels: Tensor) -> Tensor:
    """What is whitened of `raw_pixels`, at most 16×16 of them; the components that are kept are coarser still.

    Args:
        pixels: float32 (B, 3·side²).

    Returns:
        float32 (B, 3·side²), unit.
    """
    side = math.isqrt(pixels.shape[1] // 3)
    images = pixels.view(len(pixels), 3, side, side)
    return F.normalize(F.adaptive_avg_pool2d(images, min(side, _COARSE_SIDE)).flatten(1), dim=1)


class Measured(NamedTuple):
    """What one measurement found."""

    accuracies: dict[str, Accuracy | None]
    """By name; None if no query could be decoded."""
    readout: str | None
    """`plain`, `whitened` or `features`: which is better, by the training images alone; None if there is no bank."""


class KnnMonitor:
    """Measures kNN accuracy of any embedding of the training images on this rank's share of the queries.

    Neighbors are the labeled training images, or a sample of them beyond `--knn.max-rows`; the bank is used whole.
    Queries are the labeled test images, or, without a test set, up to 10,000 of those neighbors, each classified by
    the others. Rank r of W takes every W-th of them from the r-th on.

    Args:
        trainer: Gives the ranks, the partition and the bank.
        train: The training images; this rank embeds those whose rows it owns.
        test: Images to classify, or None.
        on_corrupt: Called with manifest, row, name and reason for an image that cannot be decoded.

    Raises:
        ConfigError: A test set whose images have no labels, or none of the classes of the training images.
    """

    def __init__(
        self,
        trainer: Trainer,
        train: Manifest,
        test: Manifest | None,
        on_corrupt: Callable[[Manifest, int, str, str], None],
    ) -> None:
        self._trainer, self._train, self._on_corrupt = trainer, train, on_corrupt
        self._queries = test if test is not None else train
        self.possible = train.has_labels
        self.protocol = None if not self.possible else "leave-one-out" if test is None else "test-set"
        loo = test is None
        self.voters = choose_voters(train.labels, leave_one_out=loo, max_rows=trainer.config.knn.max_rows)
        self._choosing_voters = Voters(self.voters.rows, self.voters.labels, leave_one_out=True)
        self._bank_voters = choose_voters(train.labels, leave_one_out=loo)
        self.unknown = 0
        if not self.possible:
            return
        labels = labels_among(self._queries, train)
        rows = self.voters.rows[self.voters.spread()] if loo else np.flatnonzero(labels >= 0)
        self._num_truths = int(labels.max()) + 1
        self._query_rows = rows[trainer.worker.rank :: trainer.worker.world_size]
        self._query_labels = labels[self._query_rows]
        self.unknown = int((~np.isin(labels[rows], self._bank_voters.labels)).sum())

    def describe(self) -> str:
        """What is classified by what, for the user."""
        labeled, rows = len(self._bank_voters), len(self.voters)
        sample = f"{rows:,} images drawn from the " if rows < labeled else ""
        queries = "one of every class left out" if self.voters.leave_one_out else "test images are classified"
        text = (
            f"kNN accuracy: the {self.voters.neighbors(self._trainer.config.knn.k)} nearest of {sample}{labeled:,} "
            f"labeled training images vote, {queries}"
        )
        if self.unknown:
            text += f"; {self.unknown:,} test images of classes that no training image has count as wrong"
        return text

    def counts(self, accuracy: Accuracy | None) -> dict[str, int | None]:
        """What a figure rests on, for the summary."""
        return {
            "knn_rows": len(self.voters) if self.possible else None,
            "knn_queries": None if accuracy is None else accuracy.queries,
            "knn_unknown_classes": self.unknown,
            "knn_without_neighbor": None if accuracy is None else accuracy.without_neighbor,
        }

    def measure(self, functions: Mapping[str, Embed], *, bank_as: str | None = None) -> Measured:
        """Accuracy of every function, plain and, as `NAME_whitened`, by whitened vectors; of features whitened only.

        Args:
            functions: By name; each maps images (B, 3, H, W) to vectors, unit ones where plain.
            bank_as: If given, the queries embedded by the first function are classified by the bank as well, the result
                bears this name, and a read-out is chosen: the first function plain or whitened or, if it is among
                them, the function `features` whitened.

        Raises:
            MeasurementStopped: The group was asked to stop.

        Collectives: one all-reduce, and those of `whitening.fit` and `knn_accuracy` for each function; every rank
        must call.
        """
        trainer = self._trainer
        first, rows = self._own(self.voters)
        reason = None
        try:
            tables, present = self._embed(self._train, rows, list(functions.values()))
            queries, decoded = self._embed(self._queries, self._query_rows, list(functions.values()))
        except MeasurementStopped as stopped:
            reason = str(stopped)
        raise_where_stopped(trainer, reason)
        if not len(self._query_rows):  # more ranks than queries
            queries = [table[:0] for table in tables]
        device = trainer.worker.device
        labels = torch.tensor(self._query_labels, dtype=torch.int64, device=device).masked_fill(~decoded, -1)
        kept = present.nonzero()[:, 0]
        compared = {
            name: (query, self.voters, (table[kept], kept + first))
            for name, query, table in zip(functions, queries, tables, strict=True)
        }
        if bank_as is not None:
            compared[bank_as] = (queries[0], self._bank_voters, self._bank())
        for name in functions:
            query, _, (table, places) = compared[name]
            if name == RAW_PIXELS:
                query, table = coarse_pixels(query), coarse_pixels(table)
            whiten = whitening.fit(table, trainer.exchange.sum)
            compared[f"{name}_whitened"] = (whiten(query), self.voters, (whiten(table), places))
            if name.endswith(FEATURES):
                del compared[name]  # no objective shapes their cosines
        accuracies = {
            name: knn_accuracy(
                trainer.exchange,
                trainer.config.knn,
                voters,
                Queries(query, labels, self._places(voters), self._num_truths),
                shard,
            )
            for name, (query, voters, shard) in compared.items()
        }
        if bank_as is None:
            return Measured(accuracies, None)
        trained = next(iter(functions))
        readouts = {"plain": trained, "whitened": f"{trained}_whitened", FEATURES: f"{FEATURES}_whitened"}
        return Measured(
            accuracies,
            self._best({name: compared[of][2] for name, of in readouts.items() if of in compared}),
        )

    def _best(self, tables: dict[str, tuple[Tensor, Tensor]]) -> str:
        """The read-out by which training images, some of them left out in turn, are classified best.

        Neither labels nor images of a test set take part.
        """
        trainer, voters = self._trainer, self._choosing_voters
        accuracies = {}
        for name, (table, places) in tables.items():
            asking = torch.isin(places, torch.from_numpy(voters.spread(_MOST_CHOOSING)).to(places.device))
            own = places[asking]
            queries = Queries(table[asking], voters.labels_of(own), own, len(voters.sizes))
            found = knn_accuracy(trainer.exchange, trainer.config.knn, voters, queries, (table, places))
            accuracies[name] = 0.0 if found is None else found.top1
        return max(accuracies, key=accuracies.__getitem__)  # the first of equal ones

    def _own(self, voters: Voters) -> tuple[int, npt.NDArray[np.int64]]:
        """Position of the first voter whose row this rank owns, and the rows of all of these."""
        bank = self._trainer.bank
        first, last = np.searchsorted(voters.rows, [bank.start, bank.stop])
        return int(first), voters.rows[first:last]

    def _bank(self) -> tuple[Tensor, Tensor]:
        """This rank's labeled rows of the bank and their positions among the voters."""
        bank = self._trainer.bank
        first, rows = self._own(self._bank_voters)
        table = bank.rows
        if len(rows) < len(table):
            table = table[torch.from_numpy(rows - bank.start).to(table.device)]
        return table, torch.arange(first, first + len(rows), device=table.device)

    def _places(self, voters: Voters) -> Tensor | None:
        """Positions among the voters of this rank's queries, None where they are no rows."""
        if not voters.leave_one_out:
            return None
        return torch.from_numpy(np.searchsorted(voters.rows, self._query_rows)).to(
            self._trainer.worker.device
        )

    def embed_bank(self) -> tuple[Tensor, Tensor]:
        """This rank's training images as the network embeds them now.

        Returns:
            float32 (S, D), unit rows, and bool (S,): false for an image that could not be decoded.
        """
        bank = self._trainer.bank
        (rows,), present = self._embed(self._train, np.arange(bank.start, bank.stop), [self._trainer.embed])
        return rows, present

    def _embed(
        self, manifest: Manifest, rows: npt.NDArray[np.int64], functions: list[Embed]
    ) -> tuple[list[Tensor], Tensor]:
        trainer = self._trainer
        if not len(rows):  # more ranks than labeled images
            size = trainer.config.augmentation.image_size
            one = torch.zeros(1, 3, size, size, device=trainer.worker.device)
            return [function(one).float()[:0] for function in functions], torch.zeros(
                0, dtype=torch.bool, device=trainer.worker.device
            )
        batch = trainer.local_batch
        with open_loader(
            manifest,
            (Request(0, rows[first : first + batch]) for first in range(0, len(rows), batch)),
            augmentation=trainer.config.augmentation,
            device=trainer.worker.device,
            config=trainer.config.loader,
            on_corrupt=functools.partial(self._on_corrupt, manifest),
            cache=trainer.config.data.tar_cache(),
        ) as loader:
            return embed_rows(
                until_stopped(trainer.worker, loader), len(rows), functions, trainer.worker.device
            )


def until_stopped(worker: Worker, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a measurement; raises `MeasurementStopped` once this rank is asked to stop."""
    for batch in batches:
        if reason := worker.stop_requested():
            raise MeasurementStopped(reason)
        yield batch


def raise_where_stopped(trainer: Trainer, reason: str | None) -> None:
    """Raise `MeasurementStopped` on all ranks if one was stopped: each notices it at another batch, or not yet.

    Collectives: one all-reduce; every rank must call.
    """
    asked = torch.tensor(float(reason is not None), device=trainer.worker.device)
    if trainer.exchange.sum(asked) > 0:
        raise MeasurementStopped(reason or trainer.worker.stop_requested() or "another rank")


def journal_entry(accuracies: Mapping[str, Accuracy | None], prefix: str = "") -> dict[str, float | None]:
    """What a line of the metrics file says of a measurement: by name, top-1, balanced accuracy and k."""
    entry: dict[str, float | None] = {}
    for name, each in accuracies.items():
        entry[f"{prefix}{name}"] = None if each is None else each.top1
        entry[f"balanced_{name}"] = None if each is None else each.balanced
        entry[f"k_{name}"] = None if each is None else each.k
    return entry


@torch.no_grad()
def embed_rows(
    batches: Iterable[Batch], num_rows: int, functions: list[Embed], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Embed images with one or several functions in one pass.

    Args:
        batches: Evaluation batches of one view.
        num_rows: R, images in all of them.
        functions: Each maps images (B, 3, H, W) to vectors (B, D_f).
        device: Where the results are kept.

    Returns:
        For each function float32 (R, D_f), and bool (R,): false for an image that could not be decoded.
    """
    tables: list[Tensor] = []
    present = torch.zeros(num_rows, dtype=torch.bool)
    done = 0
    for batch in batches:
        for number, function in enumerate(functions):
            embeddings = function(batch.images[0]).float()
            if done == 0:
                tables.append(torch.empty(num_rows, embeddings.shape[1], device=device))
            tables[number][done : done + len(embeddings)] = embeddings
        present[done : done + len(batch.instance_ids)] = batch.instance_ids >= 0
        done += len(batch.instance_ids)
    assert done == num_rows, (done, num_rows)
    return tables, present.to(device)


class Queries(NamedTuple):
    """This rank's Q queries; Q may differ by one between ranks."""

    embeddings: Tensor
    """float32 (Q, D), unit."""
    labels: Tensor
    """int64 (Q,), negative for none."""
    places: Tensor | None
    """int64 (Q,), position among the voters of the query itself; None where queries are no voters."""
    num_truths: int
    """Classes that the labels of all ranks can be."""


@torch.no_grad()
def knn_accuracy(
    exchange: Exchange,
    config: KnnMonitorConfig,
    voters: Voters,
    queries: Queries,
    shard: tuple[Tensor, Tensor],
) -> Accuracy | None:
    """Accuracy of the weighted vote on the queries of all ranks; None without any query.

    Args:
        exchange: Of the ranks.
        config: k and τ.
        voters: The same on every rank.
        queries: Of this rank.
        shard: This rank's rows (S, D), of any dtype, and their positions among the voters, int64 (S,), ascending.

    Collectives: for every block of queries one all-gather and one all-to-all, one all-reduce before and after; every
    rank must call.
    """
    rows_SD, places_S = shard
    device = rows_SD.device
    most = int(exchange.maximum(torch.tensor(len(queries.labels), device=device)))
    k = voters.neighbors(config.k)
    searched = voters.searched(k)
    padding = most - len(queries.labels)
    embeddings_QD = F.pad(queries.embeddings, (0, 0, 0, padding))
    truth_Q = F.pad(queries.labels, (0, padding), value=-1)
    places_Q = None if queries.places is None else F.pad(queries.places, (0, padding))
    counts_4T = torch.zeros(4, queries.num_truths, dtype=torch.float64, device=device)
    for first in range(0, most, _QUERIES_AT_A_TIME):
        chosen = slice(first, first + _QUERIES_AT_A_TIME)
        queries_GD, _ = exchange.gather(embeddings_QD[chosen], truth_Q[chosen])
        scores_GK, positions_GK = shard_top_k(queries_GD, rows_SD, searched)
        voters_GK = torch.where(positions_GK >= 0, places_S[positions_GK.clamp(min=0)], -1)
        # float64 holds every position exactly.
        parts_WBK2 = exchange.to_askers(torch.stack([scores_GK.double(), voters_GK.double()], dim=-1))
        merged_BK2 = parts_WBK2.transpose(0, 1).flatten(1, 2)
        scores_BK, voters_BK = nearest(merged_BK2[..., 0].float(), merged_BK2[..., 1].long(), searched)
        asking_B = None if places_Q is None else places_Q[chosen]
        scores_BK, voters_BK = voters.voting(scores_BK, voters_BK, asking_B, k)
        counts_4T += count_hits(
            scores_BK,
            voters.labels_of(voters_BK),
            truth_Q[chosen],
            len(voters.sizes),
            queries.num_truths,
            temperature=config.temperature,
        )
    return Accuracy.of(exchange.sum(counts_4T), k)
