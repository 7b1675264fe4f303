"""Writes snapshots in the background: every rank its own rows, rank 0 the commit. No collectives."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from cluster.errors import SnapshotError
from cluster.partition import Partition
from cluster.snapshots import (
    COMMIT,
    SCHEMA_VERSION,
    TABLES,
    checksum,
    committed_steps,
    is_chunk,
    remove_step,
    seal,
    step_folder,
    steps,
)
from cluster.storage import Storage

logger = logging.getLogger(__name__)

Rows = Tensor | NDArray[Any] | Sequence[str]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_POLL_S = 0.25


@dataclass(frozen=True)
class SnapshotReport:
    """The outcome of one save on this rank.

    Attributes:
        step: What was saved.
        error: Why it failed; None when it did not. On rank 0 no error means committed, on others that this
            rank's part is durable.
        seconds: From the call of `save` to the end.
        num_bytes: Written by this rank; on rank 0, once committed, by all.
    """

    step: int
    error: str | None
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class _Save:
    """Copies of all that one save writes."""

    step: int
    tables: Mapping[str, tuple[NDArray[Any], str]]  # rows as they are stored, and the name of their dtype
    files: Mapping[str, bytes]
    attributes: Mapping[str, Any]
    started: float


class SnapshotWriter:
    """Takes snapshots of tables that are partitioned over ranks; one writer per rank, one thread each.

    `save` copies and returns; the thread writes. A failed snapshot (full disk, vanished store) is reported, never
    raised: the caller continues, and the last committed snapshot stays. A rank whose pieces are durable leaves a small
    list of them; rank 0 waits for the lists of all ranks, then commits, then removes old snapshots. Call `close` at
    the end, also after an error: the interpreter does not exit while the thread waits for other ranks.

    Args:
        url: Directory of snapshots: a local path that all ranks see, or an fsspec URL.
        partition: Of the rows; its blocks are the chunks.
        rank: This rank.
        attempt: Name that no earlier start of this run had and all ranks agree on, of letters, digits, `.`, `_`
            and `-`.
        keep: Committed snapshots to keep, at least 1.
        best: Which of the committed steps, ascending, to keep besides the newest, or None; rank 0's thread calls it.
        timeout_s: How long rank 0 waits for the other ranks' parts before the snapshot fails.
    """

    def __init__(
        self,
        url: str | Path,
        partition: Partition,
        rank: int,
        attempt: str,
        *,
        keep: int = 2,
        best: Callable[[Sequence[int]], int | None] = lambda steps: None,
        timeout_s: float = 600.0,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1")
        _check_name("attempt", attempt)
        self._storage = Storage.at(url)
        self._partition, self._rank, self._attempt = partition, rank, attempt
        self._keep, self._best, self._timeout_s = keep, best, timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: deque[Future[SnapshotReport]] = deque()
        self._buffers: dict[str, Tensor] = {}
        self._given_up = threading.Event()
        self._last_step = -1

    def save(
        self,
        step: int,
        tables: Mapping[str, Rows],
        files: Mapping[str, bytes] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy everything and start writing. Every rank calls, with the same step, tables and attributes.

        Waits for the previous save, whose copies are being written from the same memory. No collectives.

        Args:
            step: Not below that of the previous save, whose step may be saved again if it failed.
            tables: This rank's rows, (S, …), by name: tensors on any device, arrays, or strings.
            files: Small files by name; a name is used by one rank only.
            attributes: JSON values; rank 0's count.

        Raises:
            ValueError: The arguments cannot be stored. What goes wrong later is reported by `poll`.
        """
        started = time.monotonic()
        if step < self._last_step:
            raise ValueError(f"got step {step} after {self._last_step}: steps must grow")
        num_rows = self._partition.stop(self._rank) - self._partition.start(self._rank)
        for name, rows in tables.items():
            _check_name("table", name)
            if len(rows) != num_rows:
                raise ValueError(f"table {name!r}: got {len(rows)} rows, rank {self._rank} owns {num_rows}")
        for name in files or {}:
            _check_name("file", name)
        noted = json.loads(json.dumps(dict(attributes or {}), allow_nan=False))
        self.wait()
        copies = {name: self._copy(name, rows) for name, rows in tables.items()}
        save = _Save(step, copies, dict(files or {}), noted, started)
        self._pending.append(self._thread.submit(self._run, save))
        self._last_step = step

    def poll(self) -> list[SnapshotReport]:
        """Return the reports of the saves that finished since the last call. Never waits, never raises."""
        ended = []
        while self._pending and self._pending[0].done():
            ended.append(self._pending.popleft().result())
        return ended

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return any(not save.done() for save in self._pending)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is being written, at most `timeout_s`."""
        wait_for(self._pending, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Wait as `wait` does, then stop waiting for other ranks. `poll` still returns the report of the last save."""
        self.wait(timeout_s)
        self._given_up.set()
        self._thread.shutdown()

    def _copy(self, name: str, rows: Rows) -> tuple[NDArray[Any], str]:
        """Return rows as they are stored, in memory of their own, and the name of their dtype."""
        if not isinstance(rows, Tensor):
            return stored(rows)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != rows.shape or buffer.dtype != rows.dtype:
            buffer = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(rows.detach())
        bits = buffer.view(torch.uint16) if buffer.dtype == torch.bfloat16 else buffer
        return bits.numpy(), str(rows.dtype).removeprefix("torch.")

    def _run(self, save: _Save) -> SnapshotReport:
        folder = self._storage.below(step_folder(save.step)).below(self._attempt)
        pieces: dict[str, tuple[int, int]] = {}
        num_bytes, error = 0, None
        try:
            self._write(save, folder, pieces)
            num_bytes = sum(size for size, _ in pieces.values())
            if self._rank == 0:
                num_bytes = self._commit(save, folder)
        except Exception as failure:  # also what file systems and Zarr raise; training must survive all of it
            error = f"{type(failure).__name__}: {failure}"
        return SnapshotReport(save.step, error, time.monotonic() - save.started, num_bytes)

    def _write(self, save: _Save, folder: Storage, pieces: dict[str, tuple[int, int]]) -> None:
        """Write this rank's pieces, then the list of them."""
        try:
            write_tables(
                folder,
                save.tables,
                pieces,
                num_rows=self._partition.num_rows,
                block=self._partition.block,
                start=self._partition.start(self._rank),
                writes_metadata=self._rank == 0,
            )
            folder.sync(pieces)
            for name, data in save.files.items():
                folder.write(name, data)
                pieces[name] = (len(data), checksum(name, memoryview(data)))
        except Exception as failure:
            part = {"error": f"{type(failure).__name__}: {failure}"}
            with suppress(Exception):  # so that rank 0 need not wait; it may fail for the same reason
                folder.write(self._part(self._rank), json.dumps(part).encode())
            if self._rank == 0:
                self._discard(folder)
            raise
        specs = {name: [list(rows.shape[1:]), dtype] for name, (rows, dtype) in save.tables.items()}
        folder.write(self._part(self._rank), json.dumps({"tables": specs, "pieces": pieces}).encode())

    def _commit(self, save: _Save, folder: Storage) -> int:
        """Wait for all parts, commit, remove what is old; returns the bytes of all ranks."""
        try:
            document = self._merge(save, folder)
        except Exception:
            self._discard(folder)
            raise
        # From here on nothing is removed on failure: the commit may have taken effect all the same.
        self._storage.write(f"{step_folder(save.step)}/{COMMIT}", seal(document))
        try:
            self._remove_old(save.step)
        except Exception as failure:
            logger.warning(
                "%s: cannot remove old snapshots: %s: %s", self._storage.url, type(failure).__name__, failure
            )
        return sum(size for size, _ in document["pieces"].values())

    def _merge(self, save: _Save, folder: Storage) -> dict[str, Any]:
        """Return the document to commit, after a look whether every piece is there."""
        parts = self._await_parts(folder)
        pieces: dict[str, tuple[int, int]] = {}
        for rank, part in parts.items():
            if "error" in part:
                raise SnapshotError(f"rank {rank}: {part['error']}")
            if part["tables"] != parts[0]["tables"]:
                raise SnapshotError(f"rank {rank} wrote tables {part['tables']}, rank 0 {parts[0]['tables']}")
            twice = pieces.keys() & part["pieces"].keys()
            if twice:
                raise SnapshotError(f"rank {rank} wrote {min(twice)}, which another rank wrote as well")
            pieces.update(part["pieces"])
        sizes = folder.sizes()
        gone = [name for name, (size, _) in pieces.items() if sizes.get(name) != size]
        if gone:
            raise SnapshotError(
                f"{gone[0]} was written, then removed or changed: does another run write here?"
            )
        num_chunks = sum(map(is_chunk, pieces))
        assert num_chunks == self._partition.num_blocks * len(save.tables)
        num_rows = self._partition.num_rows
        return {
            "schema_version": SCHEMA_VERSION,
            "step": save.step,
            "time": time.time(),
            "seconds": round(time.monotonic() - save.started, 3),
            "attempt": self._attempt,
            "num_rows": num_rows,
            "attributes": save.attributes,
            "tables": {name: [[num_rows, *row], dtype] for name, (row, dtype) in parts[0]["tables"].items()},
            "pieces": pieces,
        }

    def _await_parts(self, folder: Storage) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + self._timeout_s
        parts: dict[int, dict[str, Any]] = {}
        while True:
            there = folder.below("parts").sizes()
            for rank in range(self._partition.world_size):
                if rank not in parts and f"rank-{rank}.json" in there:
                    parts[rank] = json.loads(folder.read(self._part(rank)))
            missing = [rank for rank in range(self._partition.world_size) if rank not in parts]
            if not missing or any("error" in part for part in parts.values()):
                return parts
            if time.monotonic() > deadline:
                raise SnapshotError(f"rank {missing[0]} did not write its part within {self._timeout_s:g} s")
            if self._given_up.wait(_POLL_S):
                raise SnapshotError(f"closed before rank {missing[0]} had written its part")

    def _remove_old(self, committed: int) -> None:
        """Remove all but the newest commits and the best, and what interrupted writes left before this commit."""
        there = committed_steps(self._storage)
        kept = {*there[-self._keep :], committed, self._best(there)}
        for step in steps(self._storage):
            if step < committed and step not in kept:
                remove_step(self._storage, step)

    def _discard(self, folder: Storage) -> None:
        """Free the space of a failed attempt."""
        with suppress(Exception):
            self._storage.remove(folder.url.removeprefix(f"{self._storage.url}/"))

    @staticmethod
    def _part(rank: int) -> str:
        return f"parts/rank-{rank}.json"


def write_tables(
    folder: Storage,
    tables: Mapping[str, tuple[NDArray[Any], str]],
    pieces: dict[str, tuple[int, int]],
    *,
    num_rows: int,
    block: int,
    start: int = 0,
    writes_metadata: bool = True,
) -> None:
    """Write rows of tables as Zarr arrays into `tables.zarr` of a folder; they are durable once `pieces` are synced.

    Args:
        folder: Where; new.
        tables: Rows as they are stored, and the name of their dtype, by name of the table.
        pieces: Gets the size and crc32c of every piece written, by name.
        num_rows: Of each table.
        block: Rows of a chunk.
        start: The row that the first one given is; a multiple of `block`.
        writes_metadata: Whether to write what is the same for all who write rows of these tables.
    """
    store = _RecordingStore(folder.below(TABLES).zarr_store(read_only=False), pieces, writes_metadata)
    zarr.create_group(store, zarr_format=3)
    for name, (rows, dtype) in tables.items():
        array = zarr.create_array(
            store,
            name=name,
            shape=(num_rows, *rows.shape[1:]),
            chunks=(block, *rows.shape[1:]),
            dtype="string" if dtype == "string" else rows.dtype,
            compressors=[Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},  # no folder per chunk
            attributes={"dtype": dtype},
            config={"write_empty_chunks": True},  # else a chunk of zeros would look like a missing one
        )
        array[start : start + len(rows)] = rows


def stored(rows: NDArray[Any] | Sequence[str]) -> tuple[NDArray[Any], str]:
    """Return a copy of rows as they are stored, and the name of their dtype."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind in "OTU":
        return np.array(rows, dtype=np.dtypes.StringDType()), "string"
    return rows.copy(), str(rows.dtype)


class _RecordingStore(WrapperStore[Store]):
    """Notes every piece that is written through it.

    All ranks create the same arrays; the metadata of rank 0 is enough, and must not be replaced after it was synced.
    """

    def __init__(self, store: Store, pieces: dict[str, tuple[int, int]], writes_metadata: bool) -> None:
        super().__init__(store)
        self._pieces, self._writes_metadata = pieces, writes_metadata

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return None  # the folder is new; what another rank has just written there is not to be found

    async def set(self, key: str, value: Buffer) -> None:
        name, data = f"{TABLES}/{key}", memoryview(value.as_buffer_like())
        if is_chunk(name):
            self._pieces[name] = (len(data), int.from_bytes(data[-4:], "little"))  # Zarr's codec computed it
        elif self._writes_metadata:
            self._pieces[name] = (len(data), checksum(name, data))
        else:
            return
        await super().set(key, value)


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name) or name in (COMMIT, TABLES, "parts"):
        raise ValueError(f"got {kind} {name!r}, expected a name of letters, digits, '.', '_' and '-'")
