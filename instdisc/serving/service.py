"""What the requests are answered with: the state of an index that is searched, and the network that embeds images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cluster.collection import open_collection
from cluster.errors import SnapshotError
from cluster.live_topk import LiveTopK, SearchedTable
from cluster.metrics import Metrics
from cluster.tables import TableRows
from instdisc.common.errors import ConfigError
from instdisc.evaluation.images import compute_device
from instdisc.evaluation.source import Source, WhitenedRows
from instdisc.index.images import EMBEDDINGS
from instdisc.index.model import model_of
from instdisc.serving.changes import Changes
from instdisc.serving.state import State, read_keys
from instdisc.serving.together import Together
from instdisc.settings.evaluation import StoredReadout
from instdisc.settings.serve import ServeConfig
from pipelines.decode import CorruptImage, decode_rgb
from pipelines.headers import MAX_PIXELS, HeaderError, image_size
from pipelines.host import evaluation_pixels, normalized

_MOST_QUERIES, _MOST_IMAGES = 256, 32
_DECODING_THREADS = 2  # bounds the memory of large images
_LOOK_S = 2.0

Floats = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


class Query(NamedTuple):
    """A vector that is searched for."""

    state: State
    readout: StoredReadout
    vector: Floats
    k: int
    excluded: int
    """A row that does not count, -1 for none."""


class Found(NamedTuple):
    """The nearest rows, nearest first."""

    scores: Floats
    rows: npt.NDArray[np.int64]


class NotAnImageError(Exception):
    """Bytes that are searched for and are no image, or too large a one; says why."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def open_source(url: str) -> Source:
    """An index to serve.

    Raises:
        ConfigError: It is none, or is empty.
        SnapshotError: It cannot be read.
    """
    source = Source(url)
    if source.index is None:
        _ = source.snapshot  # which says so where there is nothing at all
        raise ConfigError(
            f"{url} is no index: make one with python -m instdisc.embed {url} --output INDEX, and serve that"
        )
    if not source.index.num_rows:
        raise ConfigError(f"{url} holds no images: add some with python -m instdisc.embed --append")
    return source


class Service:
    """An index, its network, and the queries that wait; `open` it before use. Methods of one event loop.

    Args:
        config: What is served.
        metrics: Counted in.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.changes = Changes(config)
        limit = config.limits.waiting
        self._search = Together(self._search_all, most=_MOST_QUERIES, waiting=limit)
        self._embed = Together(self._embed_all, most=_MOST_IMAGES, waiting=limit)
        self._decoding = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decoding")
        self.pictures = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="pictures")
        self._replacing = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._before: State | None = None
        self.state: State

    async def open(self) -> None:
        """Load the index, and look for changes of it from now on.

        Raises:
            Exception: What keeps it from being read or searched.
        """
        self._top_k = LiveTopK(self.config.actors)
        self.state = await asyncio.to_thread(self._load, open_source(self.config.index))
        self._load_network()
        self._tell()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End the actors, if there are any."""
        if self._watching is not None:
            self._watching.cancel()
        self._search.close()
        self._embed.close()
        self._decoding.shutdown(wait=False)
        self.pictures.shutdown(wait=False)
        await asyncio.to_thread(self._top_k.close)

    async def search(self, query: Query) -> Found:
        """The exact nearest rows of all shards.

        Raises:
            TooManyWaitError: Too many queries wait.
            TimeoutError: No answer within the limit.
            ClusterError: A shard is lost.
        """
        started = time.perf_counter()
        try:
            found = await asyncio.wait_for(self._search(query), self.config.limits.seconds)
        except Exception:
            self.metrics.add("serving_errors_total")
            raise
        self.metrics.observe("serving_search_seconds", time.perf_counter() - started)
        self.metrics.add("serving_queries_total")
        return found

    async def embed(self, data: bytes) -> Floats:
        """The vector of an encoded image, float32 (D,), as the network gives it.

        Raises:
            NotAnImageError: It is none, or too large.
            TooManyWaitError: Too many images wait.
        """
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoding, self._pixels, data)
        return await self._embed(pixels)

    async def refresh(self) -> bool:
        """Serve the state that the index is in now; whether it is another one than before."""
        async with self._replacing:
            url = self.config.index
            found = await asyncio.to_thread(open_collection, url)
            if found.identity == self.state.index.identity:
                return False
            state = await asyncio.to_thread(self._load, open_source(url))
            before, self._before, self.state = self._before, self.state, state
            if model_of(state.index) != model_of(
                self._before.index
            ):  # another index in the place of this one
                await asyncio.to_thread(self._load_network)
            if before is not None:  # requests of the state before the last change may still be under way
                self._drop(before)
            self._tell()
            return True

    def _load(self, source: Source) -> State:
        assert source.index is not None
        rows = TableRows(source.index, EMBEDDINGS)
        tables: dict[StoredReadout, SearchedTable] = {"plain": self._top_k.load(rows)}
        if self.config.whitened and source.whitening is not None:
            tables["whitened"] = self._top_k.load(WhitenedRows(rows, source.whitening))
        return State(source, tables, read_keys(source.index))

    def _load_network(self) -> None:
        self._network = self.state.source.network.to(compute_device())

    def _drop(self, state: State) -> None:
        for table in state.tables.values():
            self._top_k.drop(table)
        state.close()

    def _tell(self) -> None:
        self.metrics.set(
            serving_rows=self.state.num_rows,
            serving_actors=self._top_k.num_actors,
            serving_generation=self.state.index.generation,
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.refresh()
            except (SnapshotError, ConfigError, OSError) as error:  # what is there is served on
                logger.warning("the index cannot be opened again, so what is loaded stays: %s", error)

    def _pixels(self, data: bytes) -> npt.NDArray[np.uint8]:
        most = min(self.config.limits.pixels, MAX_PIXELS)
        try:
            height, width = image_size(lambda count: data[:count], len(data))
        except HeaderError as error:
            raise NotAnImageError(
                f"the image cannot be used: {error}", too_large="too large" in str(error)
            ) from error
        if height * width > most:
            raise NotAnImageError(
                f"the image has {height} x {width} pixels, the most are {most:,}: scale it down",
                too_large=True,
            )
        try:
            source = self.state.source
            image = decode_rgb(data, height, width, upright=source.turns_images)
        except (CorruptImage, MemoryError) as error:
            raise NotAnImageError("the image cannot be decoded: it is damaged or cut short") from error
        return evaluation_pixels(image, source.augmentation)

    @torch.no_grad()
    def _embed_all(self, images: list[npt.NDArray[np.uint8]]) -> Sequence[Floats]:
        pixels = torch.from_numpy(np.stack(images)).to(compute_device())
        batch = normalized(pixels, self.state.source.augmentation).permute(0, 3, 1, 2)
        return list(self._network(batch).float().cpu().numpy())

    def _search_all(self, queries: list[Query]) -> Sequence[Found]:
        """All queries of one state and read-out together."""
        found: list[Found] = [Found(np.array([], np.float32), np.array([], np.int64))] * len(queries)
        groups: dict[int, list[int]] = {}
        for place, query in enumerate(queries):
            groups.setdefault(query.state.tables[query.readout].name, []).append(place)
        for places in groups.values():
            first = queries[places[0]]
            vectors = np.stack([queries[place].vector for place in places])
            if first.readout == "whitened":
                assert first.state.whitening is not None
                vectors = first.state.whitening(torch.from_numpy(vectors)).numpy()
            most = max(queries[place].k for place in places)
            excluded = np.array([queries[place].excluded for place in places], np.int64)
            scores, rows = self._top_k.search(
                first.state.tables[first.readout], vectors, most, excluded=excluded
            )
            for place, own_scores, own_rows in zip(places, scores, rows, strict=True):
                count = min(queries[place].k, int((own_rows >= 0).sum()))
                found[place] = Found(own_scores[:count], own_rows[:count])
        return found
