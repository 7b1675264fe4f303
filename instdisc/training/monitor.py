"""Weighted kNN accuracy with the bank or with recomputed embeddings, which stay on their ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.common.classes import labels_among
from instdisc.model.votes import shard_top_k, weighted_votes
from instdisc.settings.run import KnnMonitorConfig
from instdisc.training.trainer import Trainer
from pipelines.loader import Batch, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request

_QUERIES_AT_A_TIME = 256  # per rank
_MOST_LEFT_OUT = 10_000
_RAW_SIDE = 32

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline that learns nothing: unit vectors of the pixels, at most 32×32 of them.

    Args:
        images: float (B, 3, H, W), normalised.

    Returns:
        float32 (B, 3·side²).
    """
    side = min(_RAW_SIDE, images.shape[-1])
    return F.normalize(F.adaptive_avg_pool2d(images.float(), side).flatten(1), dim=1)


class KnnMonitor:
    """Measures kNN accuracy of any embedding of the training images on this rank's share of the queries.

    Queries are the labelled test images, or, without a test set, up to 10,000 labelled training images, each classified
    by all the others. Rank r of W takes every W-th of them from the r-th on.

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
        rank, world_size = trainer.worker.rank, trainer.worker.world_size
        labelled = np.flatnonzero(np.asarray(self._queries.labels) >= 0)
        if test is None:
            spread = np.linspace(0, len(labelled) - 1, min(_MOST_LEFT_OUT, len(labelled)))
            labelled = labelled[spread.astype(np.int64)]
        self._query_rows = labelled[rank::world_size]
        self._query_labels = (
            labels_among(self._queries, train)[self._query_rows] if self.possible else labelled[:0]
        )

    def measure(
        self, functions: Mapping[str, Embed], *, bank_as: str | None = None
    ) -> dict[str, float | None]:
        """Top-1 accuracy of every function, 0 to 1; None if no query could be decoded.

        Args:
            functions: By name; each maps images (B, 3, H, W) to unit vectors.
            bank_as: If given, the queries embedded by the first function are classified by the bank as well, and the
                result bears this name.

        Collectives: those of `knn_top1`, for each function; every rank must call.
        """
        trainer = self._trainer
        start, stop = trainer.bank.start, trainer.bank.stop
        tables, present = self._embed(self._train, np.arange(start, stop), list(functions.values()))
        queries, decoded = self._embed(self._queries, self._query_rows, list(functions.values()))
        if not len(self._query_rows):  # more ranks than queries
            queries = [table[:0] for table in tables]
        device = trainer.worker.device
        row_labels = torch.tensor(self._train.labels[start:stop], dtype=torch.int64, device=device)
        labels = torch.tensor(self._query_labels, dtype=torch.int64, device=device).masked_fill(~decoded, -1)
        shards = {
            name: (query, table, row_labels.masked_fill(~present, -1))
            for name, query, table in zip(functions, queries, tables, strict=True)
        }
        if bank_as is not None:
            shards[bank_as] = (queries[0], trainer.bank.rows, row_labels.masked_fill(~present, -1))
        own_rows = None
        if self.protocol == "leave-one-out":
            own_rows = torch.tensor(self._query_rows, device=device)
        return {
            name: knn_top1(
                trainer.exchange,
                trainer.partition,
                trainer.config.knn,
                (query, labels),
                own_rows,
                (rows, rows_labels),
                len(self._train.class_names),
            )
            for name, (query, rows, rows_labels) in shards.items()
        }

    def _embed(
        self, manifest: Manifest, rows: npt.NDArray[np.int64], functions: list[Embed]
    ) -> tuple[list[Tensor], Tensor]:
        trainer = self._trainer
        batch = trainer.local_batch
        with open_loader(
            manifest,
            (Request(0, rows[first : first + batch]) for first in range(0, len(rows), batch)),
            augmentation=trainer.config.augmentation,
            training=False,
            views=1,
            seed=0,
            device=trainer.worker.device,
            config=trainer.config.loader,
            on_corrupt=functools.partial(self._on_corrupt, manifest),
        ) as loader:
            return embed_rows(loader, len(rows), functions, trainer.worker.device)


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


@torch.no_grad()
def knn_top1(
    exchange: Exchange,
    partition: Partition,
    config: KnnMonitorConfig,
    queries: tuple[Tensor, Tensor],
    self_rows: Tensor | None,
    shard: tuple[Tensor, Tensor],
    num_classes: int,
) -> float | None:
    """Fraction of the queries of all ranks whose class the weighted vote names; None without any query.

    Args:
        exchange: Of the ranks.
        partition: Of the rows.
        config: k and τ.
        queries: (Q, D) unit vectors of this rank and their labels int64 (Q,), negative for none; Q may differ by one
            between ranks.
        self_rows: int64 (Q,), the row that is the query itself and must not vote, or None.
        shard: This rank's rows (S, D), of any dtype, and their labels int64 (S,), negative for rows without a vote.
        num_classes: C.

    Collectives: for every block of queries one all-gather and one all-to-all, one all-reduce before and after; every
    rank must call.
    """
    (embeddings_QD, labels_Q), (rows_SD, row_labels_S) = queries, shard
    device = rows_SD.device
    most = int(exchange.maximum(torch.tensor(len(labels_Q), device=device)))
    neighbors = min(config.k, partition.num_rows)
    start = partition.start(exchange.rank)
    padding = most - len(labels_Q)
    embeddings_QD = F.pad(embeddings_QD, (0, 0, 0, padding))
    labels_Q = F.pad(labels_Q, (0, padding), value=-1)
    none = torch.full((most,), -1, dtype=torch.int64, device=device)
    self_Q = none if self_rows is None else F.pad(self_rows, (0, padding), value=-1)
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, most, _QUERIES_AT_A_TIME):
        chosen = slice(first, first + _QUERIES_AT_A_TIME)
        queries_GD, self_G = exchange.gather(embeddings_QD[chosen].to(rows_SD.dtype), self_Q[chosen])
        scores_GK, positions_GK = shard_top_k(queries_GD, rows_SD, neighbors, excluded_G=self_G - start)
        labels_GK = torch.where(positions_GK >= 0, row_labels_S[positions_GK.clamp(min=0)], -1)
        parts_WBK2 = exchange.to_askers(torch.stack([scores_GK, labels_GK.float()], dim=-1))
        merged_BK2 = parts_WBK2.transpose(0, 1).flatten(1, 2)
        best_BK, order_BK = merged_BK2[..., 0].topk(neighbors, dim=1)
        votes_BC = weighted_votes(
            best_BK,
            merged_BK2[..., 1].gather(1, order_BK).long(),
            num_classes,
            temperature=config.temperature,
        )
        truth_B = labels_Q[chosen]
        counts[0] += ((votes_BC.argmax(dim=1) == truth_B) & (truth_B >= 0)).sum()
        counts[1] += (truth_B >= 0).sum()
    correct, total = exchange.sum(counts).tolist()
    return float(correct / total) if total else None
