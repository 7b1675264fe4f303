"""Snapshots of tables and small files: opened by their commit, checked piece by piece as they are read.

A directory of snapshots (local, or a URL that fsspec opens) holds one folder per step:

    step-000001200/COMMIT.json            written last: names every piece with its size and checksum
    step-000001200/ATTEMPT/tables.zarr    Zarr v3; a chunk is a block of the partition, whatever the number of ranks
    step-000001200/ATTEMPT/NAME           small files
    step-000001200/ATTEMPT/parts/         what each rank wrote, for the rank that commits

Beside them lies OWNER, the id of the run that writes there. A folder without COMMIT.json is not a snapshot but
what an interrupted write left. Pieces lie in a folder of the attempt that wrote them, so that nothing of an earlier,
interrupted one can be taken for a piece of a later one.
`cluster/snapshot_writer.py` writes all this.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from cluster.errors import ClusterError, SnapshotError, SnapshotWriteError
from cluster.storage import Storage

SCHEMA_VERSION = 1
COMMIT = "COMMIT.json"
OWNER = "OWNER"
TABLES = "tables.zarr"
_STEP = re.compile(r"step-(\d{9,})")
_VERIFY_THREADS = 8


def step_folder(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:09d}"


def steps(storage: Storage) -> list[int]:
    """Return all steps that have a folder, committed or not, in ascending order."""
    matches = [_STEP.fullmatch(folder) for folder in storage.folders()]
    return sorted(int(match[1]) for match in matches if match)


def committed_steps(storage: Storage) -> list[int]:
    """Return the steps of committed snapshots, in ascending order."""
    return [step for step in steps(storage) if storage.exists(f"{step_folder(step)}/{COMMIT}")]


def remove_step(storage: Storage, step: int) -> None:
    """Delete a step's folder; its commit first, so that the rest no longer counts as a snapshot."""
    storage.remove(f"{step_folder(step)}/{COMMIT}")
    storage.remove(step_folder(step))


def checksum(name: str, data: memoryview) -> int:
    """Return the crc32c of a piece; of a chunk without its last four bytes.

    Those are this crc32c, which Zarr's codec appends. Over all bytes it would be the same number for every chunk.
    """
    return int(google_crc32c.value(bytes(data[:-4] if is_chunk(name) else data)))


def is_chunk(name: str) -> bool:
    """Whether a piece holds rows of a table."""
    return name.startswith(f"{TABLES}/") and not name.endswith("/zarr.json")


def unreadable(error: Exception) -> str:
    """Return words for a read that failed."""
    return f"cannot be read ({type(error).__name__}: {error})"


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the content of COMMIT.json: the document and its own checksum."""
    return json.dumps({**document, "crc32c": _document_checksum(document)}, allow_nan=False).encode()


def _document_checksum(document: Mapping[str, Any]) -> int:
    body = {key: value for key, value in document.items() if key != "crc32c"}
    return int(google_crc32c.value(json.dumps(body, sort_keys=True).encode()))


@dataclass(frozen=True)
class Snapshot:
    """A committed snapshot, read only. Picklable: actors open its pieces by themselves.

    Attributes:
        url: Its folder.
        document: The content of COMMIT.json.
    """

    url: str
    document: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return int(self.document["step"])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from all others of its directory."""
        return {"step": self.step, "attempt": self.document["attempt"]}

    @property
    def time(self) -> float:
        """Unix time at which it was committed."""
        return float(self.document["time"])

    @property
    def seconds(self) -> float | None:
        """How long it took to write, without the commit itself; None for one of version 0.1.0."""
        seconds: float | None = self.document.get("seconds")
        return seconds

    @property
    def attributes(self) -> dict[str, Any]:
        """What the writer noted with it, as JSON keeps it, and `schema_version`."""
        return {**self.document["attributes"], "schema_version": self.document["schema_version"]}

    @property
    def num_rows(self) -> int:
        """Rows of every table."""
        return int(self.document["num_rows"])

    @property
    def tables(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name; dtypes are those of NumPy, `bfloat16` or `string`."""
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in self.document["tables"].items()}

    @property
    def files(self) -> list[str]:
        """Names of the small files."""
        return sorted(name for name in self._pieces if not name.startswith(f"{TABLES}/"))

    def read(self, table: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `start` … `stop - 1` of a table; without `stop` all from `start` on.

        Returns:
            (stop - start, …), in the table's dtype; float32, which is exact, for bfloat16; objects of type str
            for strings.

        Raises:
            SnapshotError: There is no such table, or a piece is missing or damaged; names it.
            ValueError: The rows are not all of the table.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"got rows {start} to {stop} of a snapshot of {self.num_rows}")
        if table not in self.tables:
            raise SnapshotError(f"{self.url}: no table {table!r}; it has {', '.join(self.tables)}")
        store = _CheckedStore(self._folder.below(TABLES).zarr_store(read_only=True), self)
        try:
            rows = np.asarray(zarr.open_array(store, path=table, mode="r", zarr_format=3)[start:stop])
        except SnapshotError:
            raise
        except Exception as error:  # Zarr looks for the folder before it reads a piece
            raise self.broken(f"{TABLES}/{table}", unreadable(error)) from error
        dtype = self.tables[table][1]
        if dtype == "bfloat16":  # Zarr has none: its bits are the upper half of a float32's
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(object) if dtype == "string" else rows

    def read_file(self, name: str) -> bytes:
        """Return a small file.

        Raises:
            SnapshotError: It is missing or damaged.
        """
        if name not in self.files:
            raise SnapshotError(f"{self.url}: no file {name!r}; it has {', '.join(self.files) or 'none'}")
        data, fault = self._read_piece(name)
        if fault:
            raise self.broken(name, fault)
        return data

    def verify(self) -> list[str]:
        """Read every piece. Return the broken ones, as `name: what is wrong`; none when the snapshot is whole."""
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            faults = pool.map(lambda name: (name, self._read_piece(name)[1]), self._pieces)
            return [f"{name}: {fault}" for name, fault in faults if fault]

    def fault(self, name: str, data: memoryview | None) -> str | None:
        """Return what is wrong with a piece's content (None: it is not there), or None."""
        if name not in self._pieces:
            return "not part of the snapshot"
        size, expected = self._pieces[name]
        if data is None:
            return "missing"
        if len(data) != size:
            return f"{len(data)} bytes instead of {size}"
        appended = int.from_bytes(data[-4:], "little") if is_chunk(name) else expected
        return None if checksum(name, data) == appended == expected else "its checksum differs"

    def broken(self, name: str, fault: str) -> SnapshotError:
        """Return the error to raise for a broken piece."""
        return SnapshotError(
            f"{self.url}: {self.document['attempt']}/{name}: {fault}; restore that file, or use an earlier "
            "snapshot by naming its folder"
        )

    def _read_piece(self, name: str) -> tuple[bytes, str | None]:
        try:
            data = self._folder.read(name)
        except FileNotFoundError:
            return b"", "missing"
        except Exception as error:  # every file system that fsspec opens has errors of its own
            return b"", unreadable(error)
        return data, self.fault(name, memoryview(data))

    @property
    def _folder(self) -> Storage:
        return Storage(self.url).below(self.document["attempt"])

    @property
    def _pieces(self) -> dict[str, tuple[int, int]]:
        pieces: dict[str, tuple[int, int]] = self.document["pieces"]
        return pieces


def snapshot_steps(url: str | Path) -> list[int]:
    """The steps of the committed snapshots of a directory of snapshots, in ascending order.

    Raises:
        SnapshotError: The directory cannot be read.
    """
    with reachable(url):
        return committed_steps(Storage.at(url))


def newest_step(url: str | Path) -> int | None:
    """The step of the newest committed snapshot of a directory of snapshots; None if there is none.

    Raises:
        SnapshotError: The directory cannot be read.
    """
    return max(snapshot_steps(url), default=None)


def owner_of(url: str | Path) -> str | None:
    """The run whose snapshots a directory is for, as `take_over` noted it; None if it has no owner.

    Raises:
        SnapshotError: The directory cannot be read.
    """
    with reachable(url):
        storage = Storage.at(url)
        return storage.read(OWNER).decode() if storage.exists(OWNER) else None


def take_over(url: str | Path, owner: str) -> None:
    """Give a directory to a new run: deletes all snapshots there, committed or not. No process may be writing there.

    Raises:
        SnapshotError: The directory cannot be read or written to.
    """
    with reachable(url):
        storage = Storage.at(url)
        storage.write(OWNER, owner.encode())
        for step in steps(storage):
            remove_step(storage, step)


@contextmanager
def reachable(url: str | Path, trouble: str = "cannot be read") -> Iterator[None]:
    """Turn what a file system raises into one error: SnapshotError, of a full disk SnapshotWriteError."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:  # every file system that fsspec opens has errors of its own
        where = f"{url}: {trouble} ({type(error).__name__}: {error})"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SnapshotWriteError(f"{where}; free some space there, or choose another place") from error
        if "://" in str(url):
            raise SnapshotError(
                f"{where}; check that it can be reached and the credentials for it"
            ) from error
        raise SnapshotError(f"{where}; check the path and its permissions") from error


def open_snapshot(url: str | Path, *, check_sizes: bool = True) -> Snapshot:
    """Open a snapshot, or the newest committed one of a directory of snapshots.

    Reads its COMMIT.json and compares the size of every piece; contents are checked as they are read.

    Args:
        url: Local path or fsspec URL of either.
        check_sizes: False opens one whose pieces are missing or cut short, for `Snapshot.verify` to name them all.

    Raises:
        SnapshotError: There is none, a piece is missing, or it cannot be read; names what, and what to do.
    """
    storage = Storage.at(url)
    name = storage.url.rpartition("/")[2]
    with reachable(url):
        if _STEP.fullmatch(name) or storage.exists(COMMIT):
            return _open(storage, check_sizes)
        while True:
            step = max(committed_steps(storage), default=None)
            if step is None:
                is_there = "://" in storage.url or Path(storage.url).exists()
                raise SnapshotError(
                    f"{url}: no committed snapshot{'' if is_there else ', for it does not exist'}; give the directory "
                    "of a run, or the one that holds its step-… folders"
                )
            try:
                return _open(storage.below(step_folder(step)), check_sizes)
            except SnapshotError:
                # A running writer removes old snapshots, so this one may have gone since it was found.
                if step == max(committed_steps(storage), default=None):
                    raise


def _open(storage: Storage, check_sizes: bool) -> Snapshot:
    try:
        content = storage.read(COMMIT)
    except FileNotFoundError:
        raise SnapshotError(
            f"{storage.url}: no {COMMIT}, so this snapshot was never finished; use an earlier one"
        ) from None
    remedy = "restore it, or use an earlier snapshot by naming its folder"
    snapshot = Snapshot(storage.url, parse_sealed(content, f"{storage.url}/{COMMIT}", remedy))
    if not check_sizes:
        return snapshot
    sizes = storage.below(snapshot.document["attempt"]).sizes()
    for name, (size, _) in snapshot.document["pieces"].items():
        if sizes.get(name) != size:
            found = f"{sizes[name]} bytes instead of {size}" if name in sizes else "missing"
            raise snapshot.broken(name, found)
    return snapshot


def parse_sealed(content: bytes, name: str, remedy: str) -> dict[str, Any]:
    """The document that `seal` made content of.

    Args:
        content: Of the file.
        name: Of the file, for messages.
        remedy: What to do if it is damaged.

    Raises:
        SnapshotError: It is damaged, or a later version wrote it.
    """
    try:
        document = json.loads(content)
        version = int(document["schema_version"])
    except (ValueError, KeyError, TypeError):
        raise SnapshotError(f"{name}: damaged or truncated ({len(content)} bytes); {remedy}") from None
    if version > SCHEMA_VERSION:
        raise SnapshotError(
            f"{name}: schema version {version}, this program reads up to {SCHEMA_VERSION}; update the program"
        )
    if document.get("crc32c") != _document_checksum(document):
        raise SnapshotError(f"{name}: its checksum differs; {remedy}")
    assert isinstance(document, dict)
    return document


class _CheckedStore(WrapperStore[Store]):
    """Reads as the store does, but refuses pieces that are not as committed.

    Zarr itself takes a chunk that is missing for one of zeros.
    """

    def __init__(self, store: Store, snapshot: Snapshot) -> None:
        super().__init__(store)
        self._snapshot = snapshot

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        name = f"{TABLES}/{key}"
        try:
            value = await super().get(key, prototype, byte_range)
        except Exception as error:  # every file system that fsspec opens has errors of its own
            raise self._snapshot.broken(name, unreadable(error)) from error
        fault = self._snapshot.fault(name, None if value is None else memoryview(value.to_bytes()))
        if fault:
            raise self._snapshot.broken(name, fault)
        return value
