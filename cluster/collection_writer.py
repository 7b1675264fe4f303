"""Changes collections: blocks are written first, by any process; then one small file says that they count.

One process changes a collection at a time, which is the caller's to see to (`cluster.lease`); any number of processes
may write blocks for it. Killed at any moment, it leaves the state before or the state after.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cluster.collection import (
    BLOCKS,
    FILES,
    KEY_HASHES,
    KEYS,
    REMOVED,
    SCHEMA_VERSION,
    STATE,
    BlockEntry,
    Collection,
    Piece,
    hash_keys,
    is_collection,
    open_block,
    open_collection,
)
from cluster.errors import SnapshotError, SnapshotWriteError
from cluster.snapshot_writer import stored, write_tables
from cluster.snapshots import COMMIT, Snapshot, reachable, seal
from cluster.storage import Storage

logger = logging.getLogger(__name__)

_MERGED = "merged-"
_MOST_SMALL_BLOCKS = 32
_MOST_REMOVED = 0.25

Columns = Mapping[str, NDArray[Any] | Sequence[str]]


def write_block(url: str, name: str, tables: Columns, note: Any = None) -> None:
    """Write a block, which counts once a state refers to it.

    Args:
        url: Of the collection, as `Storage.at` has it.
        name: Of the block. One of this name that is whole already stays, and this one is dropped.
        tables: Rows by name, as many of each; `keys` among them.
        note: JSON value to keep with it.

    Raises:
        SnapshotError: It cannot be written.
    """
    keys = list(tables[KEYS])
    copies = {each: stored(rows) for each, rows in {**tables, KEY_HASHES: hash_keys(keys)}.items()}
    storage = Storage(url).below(f"{BLOCKS}/{name}")
    # The folder of an attempt is its own, so nothing of an interrupted one is taken for a part of this.
    attempt = secrets.token_hex(4)
    pieces: dict[str, tuple[int, int]] = {}
    with writable(url):
        folder = storage.below(attempt)
        write_tables(folder, copies, pieces, num_rows=len(keys), block=max(1, len(keys)))
        folder.sync(pieces)
        document = {
            "schema_version": SCHEMA_VERSION,
            "step": 0,
            "time": time.time(),
            "attempt": attempt,
            "num_rows": len(keys),
            "attributes": {"note": note},
            "tables": {each: [list(rows.shape), dtype] for each, (rows, dtype) in copies.items()},
            "pieces": pieces,
        }
        if not storage.exists(COMMIT):
            storage.write(COMMIT, seal(document))


def written_block(url: str, name: str) -> tuple[BlockEntry, Any] | None:
    """A block that is whole, and the note of its writer; None if it has to be written (again)."""
    try:
        block = open_block(url, name)
        if block is None:
            return None
        if is_complete(block):
            return BlockEntry(name, block.num_rows), block.attributes["note"]
    except SnapshotError as error:
        logger.warning("%s: written again", error)
    with writable(url):
        Storage(url).remove(f"{BLOCKS}/{name}")
    return None


def is_complete(block: Snapshot) -> bool:
    """Whether every piece is there with its size."""
    sizes = Storage(block.url).below(block.document["attempt"]).sizes()
    return all(sizes.get(name) == size for name, (size, _) in block.document["pieces"].items())


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a new state has other than the one before.

    Attributes:
        blocks: All blocks, in the order of the rows; those without rows that count are left out.
        attributes: JSON values, which replace those of the same name.
        files: Small files, likewise.
    """

    blocks: Sequence[BlockEntry]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def preview(url: str, before: Collection | None, change: Change) -> Collection:
    """The rows and attributes of the state that a change would make; without its new files."""
    specs = before.document["tables"] if before else _specs(url, change.blocks)
    return Collection(
        url,
        {
            "schema_version": SCHEMA_VERSION,
            "id": before.document["id"] if before else secrets.token_hex(8),
            "generation": before.generation + 1 if before else 1,
            "time": time.time(),
            "attributes": {**(before.attributes if before else {}), **change.attributes},
            "tables": specs,
            "files": dict(before.document["files"]) if before else {},
            "blocks": [entry for entry in change.blocks if entry.live],
        },
    )


def commit(url: str, before: Collection | None, change: Change) -> Collection:
    """Make a change count, at once, then delete what neither the state before nor this one needs.

    Args:
        url: Of the collection, as `Storage.at` has it.
        before: The current state; None for a collection that has none.
        change: Its blocks are written.

    Raises:
        SnapshotError: It cannot be written; or the current state is another one, as somebody else changed it.
    """
    storage = Storage(url)
    now = open_collection(url) if is_collection(url) else None
    if (now and now.identity) != (before and before.identity):
        raise SnapshotWriteError(
            f"{url}: another process has changed it in the meantime: run the command again"
        )
    document = dict(preview(url, before, change).document)
    with writable(url):
        for name, data in change.files.items():
            piece = f"{FILES}/{name}-{document['generation']:06d}"
            document["files"][name] = _write_piece(storage, piece, data)
        after = Collection(url, document)
        # Readers of the state before may be under way: what only they need goes with the next change.
        document["retired"] = sorted(_needed(before) - _needed(after)) if before else []
        storage.write(STATE, seal(document))
    committed = open_collection(url)
    try:
        _delete_unneeded(storage, committed, set(before.document["retired"]) if before else set())
    except Exception as failure:  # every file system that fsspec opens has errors of its own
        logger.warning(
            "%s: cannot delete what is no longer needed: %s: %s", url, type(failure).__name__, failure
        )
    return committed


def without(collection: Collection, rows: NDArray[np.int64]) -> list[BlockEntry]:
    """The blocks of a collection without some rows, int64, ascending, each once; writes which they are."""
    storage, entries = Storage(collection.url), list(collection.blocks)
    for number, entry in enumerate(entries):
        start, stop = collection.bounds_of(number)
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        if len(here):
            left = np.delete(collection.places(number), here)
            removed = np.delete(np.arange(entry.num_rows, dtype="<u4"), left)
            name = f"{REMOVED}/{entry.name}-{collection.generation + 1:06d}"
            with writable(collection.url):
                piece = _write_piece(storage, name, removed.tobytes())
            entries[number] = BlockEntry(entry.name, entry.num_rows, len(removed), piece)
    return entries


def runs_to_merge(
    blocks: Sequence[BlockEntry], block_rows: int, *, everything: bool = False
) -> list[tuple[int, int]]:
    """Which runs of neighboring blocks to rewrite, as half-open ranges of their numbers.

    By default those of which a quarter or more was removed, and small ones once there are many: over many changes a row
    is then copied a few times, however many rows there are.

    Args:
        blocks: All of them.
        block_rows: Rows of a full block.
        everything: All that are small or lack a row, if that makes them fewer or frees anything.
    """
    is_small = [2 * entry.live <= block_rows for entry in blocks]
    crowded = everything or sum(is_small) > _MOST_SMALL_BLOCKS
    chosen = [
        (small and crowded) or entry.num_removed > (0 if everything else _MOST_REMOVED * entry.num_rows)
        for small, entry in zip(is_small, blocks, strict=True)
    ]
    runs: list[tuple[int, int]] = []
    for number, is_chosen in enumerate(chosen):
        if is_chosen and runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        elif is_chosen:
            runs.append((number, number + 1))
    return [(first, last) for first, last in runs if last - first > 1 or blocks[first].num_removed]


def merged(
    collection: Collection,
    runs: Sequence[tuple[int, int]],
    block_rows: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> list[BlockEntry]:
    """The blocks of a collection with some runs of them rewritten, without removed rows and in full blocks.

    Args:
        collection: What is there.
        runs: Of `runs_to_merge`.
        block_rows: Rows of a full block.
        on_rows: Called with the number of rows copied.
    """
    entries: list[BlockEntry] = []
    position = 0
    for first, last in runs:
        entries += collection.blocks[position:first]
        start, stop = collection.bounds_of(first)[0], collection.bounds_of(last - 1)[1]
        for low in range(start, stop, block_rows):
            high = min(stop, low + block_rows)
            name = f"{_MERGED}{secrets.token_hex(8)}"
            tables = {table: collection.read(table, low, high) for table in collection.tables}
            write_block(collection.url, name, tables)
            entries.append(BlockEntry(name, high - low))
            on_rows(high - low)
        position = last
    return [*entries, *collection.blocks[position:]]


def delete_blocks(collection: Collection, names: Iterable[str]) -> None:
    """Delete those of these blocks that the state does not refer to."""
    with writable(collection.url):
        storage = Storage(collection.url)
        kept = _needed(collection) | set(collection.document["retired"])
        for name in sorted({f"{BLOCKS}/{each}" for each in names} - kept):
            storage.remove(name)


def delete_leftovers(collection: Collection) -> None:
    """Delete the blocks that interrupted changes wrote, whoever may want to continue one of them."""
    delete_blocks(collection, Storage(collection.url).below(BLOCKS).folders())


def taken_names(collection: Collection | None) -> set[str]:
    """Names of blocks that a new block must not have."""
    if collection is None:
        return set()
    return {name.partition("/")[2] for name in _needed(collection) | set(collection.document["retired"])}


def writable(url: str) -> Any:
    """Turn what a file system raises into one error; a context manager."""
    return reachable(url, "cannot be written to")


def _specs(url: str, blocks: Sequence[BlockEntry]) -> dict[str, Any]:
    block = open_block(url, blocks[0].name)
    assert block is not None
    return {name: [list(shape[1:]), dtype] for name, (shape, dtype) in block.tables.items()}


def _write_piece(storage: Storage, name: str, data: bytes) -> Piece:
    storage.write(name, data)
    return Piece(name, len(data), int(google_crc32c.value(data)))


def _needed(collection: Collection) -> set[str]:
    """Names of all folders and files that a state refers to."""
    blocks = collection.blocks
    names = {f"{BLOCKS}/{entry.name}" for entry in blocks}
    names |= {entry.removed.name for entry in blocks if entry.removed}
    return names | {str(piece[0]) for piece in collection.document["files"].values()}


def _delete_unneeded(storage: Storage, after: Collection, retired_before: set[str]) -> None:
    """Delete what the state before the last one needed, and what interrupted changes left of no use to anybody."""
    kept = _needed(after) | set(after.document["retired"])
    there = {f"{BLOCKS}/{name}" for name in storage.below(BLOCKS).folders()}
    gone = {name for name in there if name.startswith(f"{BLOCKS}/{_MERGED}")} | (there & retired_before)
    for folder in (REMOVED, FILES):
        gone |= {f"{folder}/{name}" for name in storage.below(folder).sizes()}
    for name in sorted(gone - kept):
        storage.remove(name)


def chunks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Rows start … stop - 1 of each block."""
    for start in range(0, num_rows, block_rows):
        yield start, min(num_rows, start + block_rows)
