"""Exact top-k of inner products with the rows of one process: faiss on the CPU, torch on a GPU.

A score depends on nothing but the query's place in its chunk and the row's place in its block of `BLOCK_ROWS`, since
a matrix product rounds differently where its shape differs. A table that is cut at multiples of
`BLOCK_ROWS` gives the same bits as the whole.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 1024
"""Rows that faiss multiplies with at a time."""
NO_ROW = np.uint64(2**64 - 1)
"""The key of no row; behind all others."""
_SLICE = 8 * BLOCK_ROWS  # rows whose scores are all kept at a time where ties make that necessary
_SPARE = 8  # neighbors beyond k, so that rounding to equal scores at the end rarely costs a second search

Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint64]


def to_keys(scores: Floats, rows: npt.NDArray[np.int64]) -> Keys:
    """Pack scores and rows so that ascending keys are descending scores, and ascending rows where those are equal.

    Args:
        scores: float32, any shape, no NaN.
        rows: int64, same shape, 0 to 2³² - 1; negative for no row.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # no negative zero
    descending = np.where(bits >> 31 > 0, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = descending.astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64) & np.uint64(0xFFFFFFFF)
    keys[rows < 0] = NO_ROW
    return keys


def from_keys(keys: Keys) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The inverse of `to_keys`; no row is minus infinity at -1."""
    high = (keys >> np.uint64(32)).astype(np.uint32)
    scores = np.where(high >> 31 > 0, high, ~high & np.uint32(0x7FFFFFFF)).view(np.float32)
    rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    none = keys == NO_ROW
    return np.where(none, np.float32(-np.inf), scores), np.where(none, -1, rows)


class TopKKernel(ABC):
    """Rows held by one process, and the search among them.

    Args:
        rows: float32 (S, D); rows of NaN do not count. They are overwritten with zeros, otherwise used in place.
        start: Number of the first row in the whole table.
    """

    chunk: int
    """Queries that are searched together."""
    by_chunk: bool
    """Whether a score depends on the other queries of its chunk."""

    def __init__(self, rows: Floats, start: int) -> None:
        self._missing = np.flatnonzero(np.isnan(rows[:, :1]).any(axis=1))
        rows[self._missing] = 0
        self._num_rows, self._start = len(rows), start

    def search(self, queries: Floats, k: int, excluded: npt.NDArray[np.int64]) -> Keys:
        """The k rows of the largest inner product with each query.

        Args:
            queries: float32 (Q, D).
            k: At least 1.
            excluded: int64 (Q,), number in the whole table of a row that does not count, negative for none.

        Returns:
            uint64 (Q, k), ascending `to_keys` of scores and numbers in the whole table.
        """
        parts = [slice(first, first + self.chunk) for first in range(0, len(queries), self.chunk)]
        found = self._each(lambda part: self._search_chunk(queries[part], k, excluded[part]), parts)
        return np.concatenate([np.empty((0, k), np.uint64), *found])

    def _each(self, function: Any, parts: list[slice]) -> list[Keys]:
        return [function(part) for part in parts]

    def _search_chunk(self, queries: Floats, k: int, excluded: npt.NDArray[np.int64]) -> Keys:
        scores, positions, floors = self._candidates(queries, min(k + _SPARE, self._num_rows))
        keys = self._counted(scores, positions, excluded)
        keys.sort(axis=1)
        if keys.shape[1] < self._num_rows:
            kth = from_keys(keys[:, k - 1])[0]
            incomplete = kth <= floors  # minus infinity: fewer than k of them count
            if incomplete.any():
                again = np.ones_like(incomplete) if self.by_chunk else incomplete
                found = self._search_all(queries[again], k, excluded[again])
                keys[incomplete, :k] = found[incomplete[again]]
        return np.pad(keys[:, :k], ((0, 0), (0, max(0, k - keys.shape[1]))), constant_values=NO_ROW)

    def _search_all(self, queries: Floats, k: int, excluded: npt.NDArray[np.int64]) -> Keys:
        """The same by looking at every row: for queries with more equal scores at the end than there are spare ones."""
        best = np.full((len(queries), k), NO_ROW)
        for first in range(0, self._num_rows, _SLICE):
            scores, positions = self._all(queries, first, min(first + _SLICE, self._num_rows))
            keys = np.concatenate([best, self._counted(scores, positions, excluded)], axis=1)
            best = np.partition(keys, k - 1, axis=1)[:, :k]
        best.sort(axis=1)
        return best

    def _counted(
        self, scores: Floats, positions: npt.NDArray[np.int64], excluded: npt.NDArray[np.int64]
    ) -> Keys:
        rows = positions + self._start
        out = rows == excluded[:, None]
        if len(self._missing):
            out |= np.isin(positions, self._missing)
        return to_keys(scores, np.where(out, -1, rows))

    @abstractmethod
    def _candidates(self, queries: Floats, count: int) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
        """At least `count` positions per query with their scores; no other row scores above the floor, (Q,)."""

    @abstractmethod
    def _all(self, queries: Floats, first: int, last: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Scores and positions of rows first … last - 1 in any order, (Q, last - first)."""


class FaissKernel(TopKKernel):
    """On the CPU, with one chunk of queries per thread."""

    chunk = 256
    by_chunk = True

    def __init__(self, rows: Floats, start: int, threads: int) -> None:
        # It logs at length which instruction sets it was built for.
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)
        import faiss

        super().__init__(rows, start)
        self._rows = rows
        # By default small chunks are multiplied row by row, four times slower.
        faiss.cvar.distance_compute_blas_threshold = 1
        assert faiss.cvar.distance_compute_blas_database_bs == BLOCK_ROWS
        self._threads = ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,))

    def _each(self, function: Any, parts: list[slice]) -> list[Keys]:
        return list(self._threads.map(function, parts))

    def _candidates(self, queries: Floats, count: int) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
        scores, positions = self._knn(queries, 0, self._num_rows, count)
        return scores, positions, scores[:, -1]

    def _all(self, queries: Floats, first: int, last: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        return self._knn(queries, first, last, last - first)

    def _knn(self, queries: Floats, first: int, last: int, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        import faiss

        scores, positions = faiss.knn(queries, self._rows[first:last], k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, positions + first


class TorchKernel(TopKKernel):
    """On a GPU: matrix products with tiles of rows find candidates, which are then ranked by products of their own."""

    chunk = 1024
    by_chunk = False
    _TILE = 32_768  # rows
    _MOST_PRODUCTS = 1 << 28  # float32 products held at a time

    def __init__(self, rows: Floats, start: int, device: str) -> None:
        import torch

        super().__init__(rows, start)
        self._rows = torch.from_numpy(rows).to(device)
        # By how much the two products of a row and a query of length 1 can differ, both rounded to float32.
        self._rounding = float(self._rows.norm(dim=1).max()) * rows.shape[1] * 2.0**-22

    def _candidates(self, queries: Floats, count: int) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
        import torch

        queries_cD = torch.tensor(queries, device=self._rows.device)
        wide = min(count + max(64, count // 2), self._num_rows)
        coarse_cW, positions_cW = queries_cD[:, :0], queries_cD[:, :0].long()
        for first in range(0, self._num_rows, self._TILE):
            scores_cT = queries_cD @ self._rows[first : first + self._TILE].T
            coarse_cT, chosen_cT = scores_cT.topk(min(wide, scores_cT.shape[1]), dim=1)
            coarse_cR = torch.cat([coarse_cW, coarse_cT], dim=1)
            coarse_cW, chosen_cW = coarse_cR.topk(min(wide, coarse_cR.shape[1]), dim=1)
            positions_cW = torch.cat([positions_cW, chosen_cT + first], dim=1).gather(1, chosen_cW)
        scores_cK, chosen_cK = self._products(queries_cD, positions_cW).topk(count, dim=1)
        floors_c = coarse_cW[:, -1] + queries_cD.norm(dim=1) * self._rounding
        if wide > count:
            floors_c = floors_c.maximum(scores_cK[:, -1])
        return (
            scores_cK.cpu().numpy(),
            positions_cW.gather(1, chosen_cK).cpu().numpy(),
            floors_c.cpu().numpy(),
        )

    def _products(self, queries_cD: torch.Tensor, positions_cR: torch.Tensor) -> torch.Tensor:
        """Inner products of every query with its own rows, one by one, so that none depends on its neighbors."""
        import torch

        step = max(1, self._MOST_PRODUCTS // (positions_cR.shape[1] * queries_cD.shape[1]))
        pieces = zip(torch.split(positions_cR, step), torch.split(queries_cD, step), strict=True)
        return torch.cat(
            [(self._rows[positions] * queries[:, None]).sum(dim=2) for positions, queries in pieces]
        )

    def _all(self, queries: Floats, first: int, last: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        import torch

        positions_R = torch.arange(first, last, device=self._rows.device)
        positions_cR = positions_R.expand(len(queries), -1)
        scores_cR = self._products(torch.tensor(queries, device=self._rows.device), positions_cR)
        return scores_cR.cpu().numpy(), positions_cR.cpu().numpy()
