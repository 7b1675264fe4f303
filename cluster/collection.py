"""A collection: rows with unique keys that are added, removed and replaced while others read.

A directory (local, or a URL that fsspec opens) holds

    STATE.json                  which blocks, rows and files count now; replaced at once by every change
    blocks/NAME/                rows, in the form of a snapshot: COMMIT.json, and ATTEMPT/tables.zarr
    removed/BLOCK-GENERATION    the rows of a block that no longer count: uint32, little-endian, ascending
    files/NAME-GENERATION       small files
    LEASE                       who is writing

Nothing that a state refers to is ever written to again, so whoever has read STATE.json reads one state, whatever
changes meanwhile. What the state before needs stays until the change after: readers of it can finish.
`cluster/collection_writer.py` writes all this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cluster.errors import SnapshotError
from cluster.snapshots import COMMIT, Snapshot, parse_sealed, reachable, unreadable
from cluster.storage import Storage

SCHEMA_VERSION = 1
STATE = "STATE.json"
BLOCKS, REMOVED, FILES = "blocks", "removed", "files"
KEYS, KEY_HASHES = "keys", "key_hashes"
_HASH_BYTES = 8
_REMEDY = "open the index again if it was changed since; otherwise restore that file, or make the index again"


class Piece(NamedTuple):
    """A file that a state refers to."""

    name: str
    size: int
    crc32c: int


class BlockEntry(NamedTuple):
    """A block in a state.

    Attributes:
        name: Its folder.
        num_rows: That it holds.
        num_removed: Of which so many no longer count.
        removed: The file that says which.
    """

    name: str
    num_rows: int
    num_removed: int = 0
    removed: Piece | None = None

    @property
    def live(self) -> int:
        """Rows that count."""
        return self.num_rows - self.num_removed


class Block(Snapshot):
    """The rows of a block, removed ones included."""

    def broken(self, name: str, fault: str) -> SnapshotError:
        """Return the error to raise for a broken piece."""
        return SnapshotError(f"{self.url}/{self.document['attempt']}/{name}: {fault}; {_REMEDY}")


@dataclass(frozen=True)
class Collection:
    """One state of a collection, read only. Picklable: actors open its pieces by themselves.

    Rows are numbered without gaps, in the order of the blocks.

    Attributes:
        url: Its directory.
        document: The content of STATE.json.
    """

    url: str
    document: Mapping[str, Any]
    _opened: dict[str, Block] = field(default_factory=dict, compare=False, repr=False)

    @property
    def generation(self) -> int:
        """Rises by one with every change."""
        return int(self.document["generation"])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this state from all others."""
        return {"step": self.step, "attempt": f"{self.document['id']}-{self.generation}"}

    @property
    def step(self) -> int:
        """The step of training that the rows are of."""
        return int(self.attributes["step"])

    @property
    def attributes(self) -> dict[str, Any]:
        """What the writer noted, as JSON keeps it."""
        return dict(self.document["attributes"])

    @property
    def tables(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name; dtypes are those of NumPy, or `string`."""
        return {
            name: ((self.num_rows, *row), dtype) for name, (row, dtype) in self.document["tables"].items()
        }

    @property
    def files(self) -> list[str]:
        """Names of the small files."""
        return sorted(self.document["files"])

    @property
    def num_rows(self) -> int:
        """Rows that count."""
        return int(self._bounds[-1])

    @cached_property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """The blocks, in the order of the rows."""
        return tuple(
            BlockEntry(name, rows, removed, None if piece is None else Piece(*piece))
            for name, rows, removed, piece in self.document["blocks"]
        )

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,): block i has rows bounds[i] … bounds[i + 1] - 1."""
        return np.cumsum([0, *(entry.live for entry in self.blocks)])

    def read(self, table: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `start` … `stop - 1` of a table; see `Snapshot.read`.

        Raises:
            SnapshotError: There is no such table, or a piece is missing or damaged; names it.
            ValueError: The rows are not all of the table.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"got rows {start} to {stop} of a collection of {self.num_rows}")
        if table not in self.tables:
            raise SnapshotError(f"{self.url}: no table {table!r}; it has {', '.join(self.tables)}")
        first = max(0, int(np.searchsorted(self._bounds, start, side="right")) - 1)
        parts = []
        for number in range(first, len(self.blocks)):
            low, high = self.bounds_of(number)
            if low >= stop:
                break
            parts.append(self.read_block(number, table, max(start, low) - low, min(stop, high) - low))
        return np.concatenate(parts) if parts else self._no_rows(table)

    def read_rows(self, table: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return some rows of a table, int64 (M,), in any order and any of them twice."""
        found = np.empty((len(rows), *self.tables[table][0][1:]), self._no_rows(table).dtype)
        blocks = np.searchsorted(self._bounds, rows, side="right") - 1
        for number in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == number)
            wanted = rows[here] - self._bounds[number]
            first = int(wanted.min())
            found[here] = self.read_block(number, table, first, int(wanted.max()) + 1)[wanted - first]
        return found

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each key, int64, -1 for one that is not there.

        Eight bytes are read of every row, and the keys of blocks that seem to hold one.
        """
        asked = np.sort(hash_keys(keys))
        rows: dict[str, int] = {}
        for number, entry in enumerate(self.blocks):
            if not entry.live or not len(asked):
                continue
            hashes = self.read_block(number, KEY_HASHES, 0, entry.live)
            places = np.minimum(np.searchsorted(asked, hashes), len(asked) - 1)
            hits = np.flatnonzero(asked[places] == hashes)
            if len(hits):
                names = self.read_block(number, KEYS, int(hits[0]), int(hits[-1]) + 1)[hits - hits[0]]
                rows |= zip(names.tolist(), (hits + self._bounds[number]).tolist(), strict=True)
        return np.array([rows.get(key, -1) for key in keys], np.int64)

    def bounds_of(self, number: int) -> tuple[int, int]:
        """The rows of a block, half-open."""
        return int(self._bounds[number]), int(self._bounds[number + 1])

    def read_block(self, number: int, table: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start … stop - 1 of a block, counted among those of its rows that count."""
        if start == stop:
            return self._no_rows(table)
        places = self.places(number)[start:stop]
        first = int(places[0])
        rows = self.block(number).read(table, first, int(places[-1]) + 1)
        return rows if len(rows) == len(places) else rows[places - first]

    def places(self, number: int) -> NDArray[np.int64]:
        """Where in its block each of the rows that count is, int64, ascending."""
        entry = self.blocks[number]
        places = np.arange(entry.num_rows)
        if entry.removed is None:
            return places
        return np.delete(places, np.frombuffer(self._read_piece(entry.removed), "<u4").astype(np.int64))

    def block(self, number: int) -> Block:
        """A block, opened once.

        Raises:
            SnapshotError: It is missing or damaged.
        """
        entry = self.blocks[number]
        if entry.name not in self._opened:
            block = open_block(self.url, entry.name)
            if block is None or block.num_rows != entry.num_rows:
                fault = "missing" if block is None else f"{block.num_rows} rows instead of {entry.num_rows}"
                raise SnapshotError(f"{self.url}/{BLOCKS}/{entry.name}: {fault}; {_REMEDY}")
            self._opened[entry.name] = block
        return self._opened[entry.name]

    def read_file(self, name: str) -> bytes:
        """Return a small file.

        Raises:
            SnapshotError: It is missing or damaged.
        """
        if name not in self.document["files"]:
            raise SnapshotError(f"{self.url}: no file {name!r}; it has {', '.join(self.files) or 'none'}")
        return self._read_piece(Piece(*self.document["files"][name]))

    def verify(self, on_block: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Read every piece. Yield the broken ones, each with what is wrong.

        Args:
            on_block: Called after each block.
        """
        pieces = [Piece(*piece) for piece in self.document["files"].values()]
        for piece in pieces + [entry.removed for entry in self.blocks if entry.removed]:
            try:
                self._read_piece(piece)
            except SnapshotError as error:
                yield str(error)
        for number, entry in enumerate(self.blocks):
            try:
                yield from (f"{BLOCKS}/{entry.name}: {fault}" for fault in self.block(number).verify())
            except SnapshotError as error:
                yield str(error)
            on_block()

    def _no_rows(self, table: str) -> NDArray[Any]:
        shape, dtype = self.tables[table]
        return np.empty((0, *shape[1:]), object if dtype == "string" else dtype)

    def _read_piece(self, piece: Piece) -> bytes:
        try:
            data = Storage(self.url).read(piece.name)
        except FileNotFoundError:
            fault = "missing"
        except Exception as error:  # every file system that fsspec opens has errors of its own
            fault = unreadable(error)
        else:
            if len(data) == piece.size and google_crc32c.value(data) == piece.crc32c:
                return data
            fault = "its size or checksum differs"
        raise SnapshotError(f"{self.url}/{piece.name}: {fault}; {_REMEDY}")


def hash_keys(keys: Sequence[str]) -> NDArray[np.uint64]:
    """The first eight bytes of each key's BLAKE2b hash, uint64."""
    digests = [hashlib.blake2b(key.encode(), digest_size=_HASH_BYTES).digest() for key in keys]
    return np.frombuffer(b"".join(digests), "<u8")


def open_block(url: str, name: str) -> Block | None:
    """A block, referred to by a state or not; None if there is none, or it was never finished.

    Raises:
        SnapshotError: It is damaged, or cannot be read.
    """
    place = Storage(url).below(f"{BLOCKS}/{name}")
    with reachable(place.url):
        try:
            content = place.read(COMMIT)
        except FileNotFoundError:
            return None
    return Block(place.url, parse_sealed(content, f"{place.url}/{COMMIT}", _REMEDY))


def is_collection(url: str | Path) -> bool:
    """Whether there is a collection that has a state.

    Raises:
        SnapshotError: That cannot be told.
    """
    with reachable(url):
        return Storage.at(url).exists(STATE)


def open_collection(url: str | Path) -> Collection:
    """Open a collection in its current state. What it holds is checked as it is read.

    Raises:
        SnapshotError: There is none, it is damaged, or a later version wrote it.
    """
    storage = Storage.at(url)
    with reachable(url):
        try:
            content = storage.read(STATE)
        except FileNotFoundError:
            raise SnapshotError(
                f"{url}: no {STATE}, so there is no index, or it was never finished: run the command that began it "
                "again"
            ) from None
    document = parse_sealed(content, f"{storage.url}/{STATE}", "restore it from a copy")
    return Collection(storage.url, document)
