"""Exact top-k over a table too large for one process: every actor holds a block of its rows.

The actors load their rows themselves, so that the driver never holds the table; queries are put into Ray's store once,
every actor answers with the best of its own rows, and the driver merges the answers. The result does not depend on the
number of actors, up to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from cluster.actors import available_threads, choose_actors, connect, get, share_out
from cluster.errors import ClusterError
from cluster.settings import ActorsConfig
from cluster.topk_kernels import BLOCK_ROWS, FaissKernel, TopKKernel, TorchKernel, from_keys

if TYPE_CHECKING:
    from cluster.metrics import Metrics

_LOADED_AT_A_TIME = 64 * BLOCK_ROWS
_QUERIES_AT_A_TIME = 4096
# Otherwise the batches, and the last bits of the computed rows, would depend on the number of actors.
_ROWS_COMPUTED_AT_A_TIME = 256
_IN_FLIGHT = 2  # blocks of queries: one is merged while the next is searched
_MOST_ROWS = 1 << 32

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class RowSource(Protocol):
    """Where rows come from; picklable, and read by several processes at once."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole table."""

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1, (stop - start, D) of any floating type; a row of NaN is one that is never found."""


class StoredSource:
    """A source in Ray's object store, for as long as this process is connected.

    An actor that restarts needs its source again, but Ray keeps a constructor's arguments for the first start alone,
    and prints an error about references among them. So the reference travels as bytes, which makes Ray keep the source.
    """

    def __init__(self, source: RowSource) -> None:
        import ray

        self._reference: bytes = ray.cloudpickle.dumps(ray.put(source))  # type: ignore[no-untyped-call]
        self.num_rows = source.num_rows

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1 of the source."""
        return self._source.read(start, stop)

    @functools.cached_property
    def _source(self) -> RowSource:
        import ray

        source: RowSource = ray.get(ray.cloudpickle.loads(self._reference))
        return source


class Shard:
    """The rows start … stop - 1 of a source, and the search among them; the class of the actors.

    Args:
        source: Where the rows are.
        start: A multiple of `BLOCK_ROWS`.
        stop: Likewise, or the end of the table.
        threads: Used by the search, unless it is on a GPU.
        use_gpu: Whether it is.
    """

    def __init__(self, source: RowSource, start: int, stop: int, threads: int, use_gpu: bool) -> None:
        self._identity = uuid.uuid4().hex
        self._load = functools.partial(_load, source, start, stop)
        self._start, self._threads, self._use_gpu = start, threads, use_gpu

    def ready(self) -> str:
        """Return when the rows are loaded, with a name that a restarted actor has another of.

        Not the constructor loads them: Ray passes on the error of a call, but of a constructor only its text, and
        starts an actor that dies there without end.

        Raises:
            Exception: What went wrong with the rows.
        """
        _ = self._kernel
        return self._identity

    @functools.cached_property
    def _kernel(self) -> TopKKernel:
        rows = self._load()
        if self._use_gpu:
            return TorchKernel(rows, self._start, "cuda")
        return FaissKernel(rows, self._start, self._threads)

    def search(
        self, queries: Floats, excluded: Ids, first: int, last: int, k: int
    ) -> tuple[str, npt.NDArray[np.uint64]]:
        """`ready`, and `TopKKernel.search` for queries first … last - 1."""
        return self.ready(), self._kernel.search(queries[first:last], k, excluded[first:last])


def _load(source: RowSource, start: int, stop: int) -> Floats:
    rows: Floats | None = None
    for first in range(start, stop, _LOADED_AT_A_TIME):
        last = min(first + _LOADED_AT_A_TIME, stop)
        block = source.read(first, last)
        if block.ndim != 2 or len(block) != last - first:
            raise ClusterError(
                f"rows {first} to {last} came as an array of {block.shape}, expected two dimensions"
            )
        if rows is None:
            rows = np.empty((stop - start, block.shape[1]), np.float32)
        rows[first - start : last - start] = block
    if rows is None:
        raise ClusterError(f"the table has {source.num_rows} rows: nothing to search")
    return rows


class TopK:
    """Exact search in a table, by actors or, with `num_actors=0`, in this process; a context manager.

    Args:
        source: The rows; fewer than 2³².
        config: Where the actors run. There are never more than blocks of `BLOCK_ROWS` rows.
        metrics: Records rows, actors and searches, under names that begin with `evaluation_`.

    Raises:
        ClusterError: The cluster has no room for the actors.
        Exception: What reading the source raised.
    """

    def __init__(self, source: RowSource, config: ActorsConfig, metrics: Metrics | None = None) -> None:
        assert source.num_rows < _MOST_ROWS, source.num_rows
        self.num_rows, self._metrics = source.num_rows, metrics
        self._known: set[str] = set()
        self._local: Shard | None = None
        self._actors: list[Any] = []
        self._session = contextlib.ExitStack()
        if config.num_actors == 0:
            from cluster.gpus import may_use_gpu  # which imports torch

            self._local = Shard(source, 0, self.num_rows, available_threads(), may_use_gpu())
            self._local.ready()
            self._tell_size()
            return
        self._session.enter_context(connect(config))
        try:
            self._start(source, config)
        except BaseException:
            self.close()
            raise
        self._tell_size()

    def _tell_size(self) -> None:
        if self._metrics is not None:
            self._metrics.set(evaluation_rows=self.num_rows, evaluation_actors=len(self._actors))

    def _start(self, source: RowSource, config: ActorsConfig) -> None:
        import ray

        group = choose_actors(config)
        stored = StoredSource(source)
        actor_class = ray.remote(
            num_cpus=group.cpus,
            num_gpus=group.gpus,
            max_restarts=-1,
            max_task_retries=2,
            scheduling_strategy="SPREAD",
        )(Shard)
        self._actors = [
            actor_class.remote(stored, start, stop, max(1, int(group.cpus)), group.gpus > 0)
            for start, stop in cut(self.num_rows, group.num_workers)
        ]
        self._known = set(get([actor.ready.remote() for actor in self._actors]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
        self._actors = []
        self._session.close()

    def search(self, queries: Floats, k: int, *, excluded: Ids | None = None) -> tuple[Floats, Ids]:
        """The k rows with the largest inner product with each query.

        Args:
            queries: float32 (Q, D), finite.
            k: At least 1.
            excluded: int64 (Q,), a row that does not count for the query, negative for none.

        Returns:
            Scores float32 (Q, k), descending, and rows int64 (Q, k), ascending where scores are equal. Where fewer than
            k rows count, the rest is minus infinity at row -1.

        Raises:
            WorkerLostError: An actor died repeatedly.
            Exception: What reading the source raised.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        excluded = np.full(len(queries), -1) if excluded is None else np.asarray(excluded, np.int64)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        if self._local is not None:
            answers = self._search_here(queries, excluded, k)
        else:
            answers = self._search_actors(queries, excluded, k)
        asked = time.perf_counter()
        for first, keys in answers:
            scores[first : first + len(keys)], rows[first : first + len(keys)] = from_keys(keys)
            if self._metrics is not None:
                answered = time.perf_counter()
                self._metrics.observe("evaluation_search_seconds", answered - asked)
                self._metrics.add("evaluation_queries_total", len(keys))
                asked = answered
        return scores, rows

    def _search_here(
        self, queries: Floats, excluded: Ids, k: int
    ) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        assert self._local is not None
        for first in range(0, len(queries), _QUERIES_AT_A_TIME):
            _, keys = self._local.search(queries, excluded, first, first + _QUERIES_AT_A_TIME, k)
            yield first, keys

    def _search_actors(
        self, queries: Floats, excluded: Ids, k: int
    ) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """Blocks of queries in their order, with the best rows of all actors; a few blocks are under way at a time."""
        import ray

        stored = ray.put(queries), ray.put(excluded)
        firsts = iter(range(0, len(queries), _QUERIES_AT_A_TIME))

        def submit(first: int) -> tuple[int, list[Any]]:
            return first, [
                actor.search.remote(*stored, first, first + _QUERIES_AT_A_TIME, k) for actor in self._actors
            ]

        under_way = deque(submit(first) for first in itertools.islice(firsts, _IN_FLIGHT))
        while under_way:
            first, references = under_way.popleft()
            identities, parts = zip(*get(references), strict=True)
            self._count_restarts(set(identities))
            under_way.extend(submit(following) for following in itertools.islice(firsts, 1))
            keys = np.concatenate(parts, axis=1)
            if len(parts) > 1:
                keys.sort(axis=1)
            yield first, keys[:, :k]

    def _count_restarts(self, identities: set[str]) -> None:
        if self._metrics is not None:
            self._metrics.add("evaluation_actor_restarts_total", len(identities - self._known))
        self._known |= identities


def read_rows(source: RowSource, config: ActorsConfig) -> npt.NDArray[Any]:
    """Read a whole table that is computed or decoded as it is read, in as many processes as there are actors.

    Returns:
        What `source.read(0, num_rows)` returns.

    Raises:
        ClusterError: The cluster has no room.
        WorkerLostError: A process died repeatedly.
        Exception: What reading the source raised.
    """
    if config.num_actors == 0:
        return source.read(0, source.num_rows)
    with connect(config):
        pieces = cut(source.num_rows, choose_actors(config).num_workers, _ROWS_COMPUTED_AT_A_TIME)
        return np.concatenate(list(share_out(_read, source, pieces, config)))


def _read(source: RowSource, piece: tuple[int, int]) -> npt.NDArray[Any]:
    return source.read(*piece)


def cut(num_rows: int, num_actors: int, block: int = BLOCK_ROWS) -> list[tuple[int, int]]:
    """Rows start … stop - 1 of every actor: whole blocks, at least one each."""
    blocks = max(1, -(-num_rows // block))
    parts = min(num_actors, blocks)
    bounds = [min(num_rows, blocks * part // parts * block) for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))
