"""Exact top-k over tables that are replaced while they are searched.

As `cluster/topk.py`, whose shards these are, but the processes that hold the rows stay when the rows change: a new
table is loaded beside the old one, and a search names its table, so all shards answer for one and the same.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from cluster.actors import available_threads, choose_actors, connect, get
from cluster.settings import ActorsConfig
from cluster.topk import Floats, Ids, RowSource, Shard, StoredSource, cut
from cluster.topk_kernels import Keys, from_keys

_names = itertools.count()


class _Part(NamedTuple):
    """The rows of a table that one process holds; a process that is restarted loads them with it again."""

    table: int
    source: RowSource
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SearchedTable:
    """A table that is loaded.

    Attributes:
        name: Of this table among those of a `LiveTopK`.
        num_rows: Of all its parts.
    """

    name: int
    num_rows: int
    _parts: Sequence[_Part] = field(repr=False)


class _Holder:
    """One process with its parts of all tables; the class of the actors."""

    def __init__(self, threads: int, use_gpu: bool) -> None:
        self._threads, self._use_gpu = threads, use_gpu
        self._shards: dict[int, Shard] = {}
        self._loading = threading.Lock()

    def load(self, part: _Part) -> None:
        """Return when the part is there; raises what went wrong with its rows."""
        with self._loading:
            if part.table not in self._shards:
                shard = Shard(part.source, part.start, part.stop, self._threads, self._use_gpu)
                shard.ready()
                self._shards[part.table] = shard

    def search(self, part: _Part, queries: Floats, excluded: Ids, k: int) -> Keys:
        """As `Shard.search` for all queries."""
        if part.table not in self._shards:
            self.load(part)
        return self._shards[part.table].search(queries, excluded, 0, len(queries), k)[1]

    def drop(self, table: int) -> None:
        """Free the rows of a table."""
        self._shards.pop(table, None)


class LiveTopK:
    """Exact search by actors or, with `num_actors=0`, in this process; a context manager. May be used by threads.

    Args:
        config: Where the actors run, each with a share of every table.

    Raises:
        ClusterError: The cluster has no room for the actors.
    """

    def __init__(self, config: ActorsConfig) -> None:
        self._local: _Holder | None = None
        self._actors: list[Any] = []
        self._session = contextlib.ExitStack()
        if config.num_actors == 0:
            from cluster.gpus import may_use_gpu  # which imports torch

            self._local = _Holder(available_threads(), may_use_gpu())
            return
        self._session.enter_context(connect(config))
        import ray

        group = choose_actors(config)
        remote: Any = ray.remote
        actor_class = remote(
            num_cpus=group.cpus,
            num_gpus=group.gpus,
            max_restarts=-1,
            max_task_retries=2,
            max_concurrency=2,  # a table is loaded while another is searched
            scheduling_strategy="SPREAD",
        )(_Holder)
        self._actors = [
            actor_class.remote(max(1, int(group.cpus)), group.gpus > 0) for _ in range(group.num_workers)
        ]

    @property
    def num_actors(self) -> int:
        """Processes beside this one."""
        return len(self._actors)

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

    def load(self, source: RowSource) -> SearchedTable:
        """Load a table; those that are there can be searched meanwhile.

        Raises:
            WorkerLostError: An actor died repeatedly.
            Exception: What reading the source raised.
        """
        name, stored = next(_names), source if self._local else StoredSource(source)
        pieces = cut(source.num_rows, len(self._actors) or 1)
        table = SearchedTable(name, source.num_rows, [_Part(name, stored, *piece) for piece in pieces])
        if self._local is not None:
            self._local.load(table._parts[0])
        else:
            get([actor.load.remote(part) for actor, part in zip(self._actors, table._parts, strict=False)])
        return table

    def drop(self, table: SearchedTable) -> None:
        """Free the rows of a table that is not searched any more."""
        if self._local is not None:
            self._local.drop(table.name)
        for actor in self._actors:
            actor.drop.remote(table.name)

    def search(
        self, table: SearchedTable, queries: Floats, k: int, *, excluded: Ids | None = None
    ) -> tuple[Floats, Ids]:
        """The k rows of a table with the largest inner product with each query, exactly: of all its parts, or an error.

        Args:
            table: From `load`.
            queries: float32 (Q, D), finite; a few thousand at most.
            k: At least 1.
            excluded: int64 (Q,), a row that does not count for the query, negative for none.

        Returns:
            As `cluster.topk.TopK.search`.

        Raises:
            WorkerLostError: An actor died repeatedly.
            Exception: What reading the source raised, of an actor that was restarted.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        excluded = np.full(len(queries), -1) if excluded is None else np.asarray(excluded, np.int64)
        if self._local is not None:
            return from_keys(self._local.search(table._parts[0], queries, excluded, k))
        keys = np.concatenate(
            get(
                [
                    actor.search.remote(part, queries, excluded, k)
                    for actor, part in zip(self._actors, table._parts, strict=False)
                ]
            ),
            axis=1,
        )
        keys.sort(axis=1)
        return from_keys(keys[:, :k])
