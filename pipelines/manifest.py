"""The ordered list of all images of a data set. A row number is the instance id."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.errors import DataError
from pipelines.places import Place, below, place
from pipelines.strings import StringTable, printable
from pipelines.whole import written_whole

SCHEMA = 3
_WITHOUT_CHECKSUMS = 2  # the schema of manifests that do not cover what the images hold
_NOT_TURNED = 1  # the schema of manifests with sizes as stored
_META, _ROWS, _SOURCES = "meta.json", "manifest.arrow", "sources.arrow"
# Little-endian everywhere, so that saved files and fingerprints mean the same on every machine.
_COLUMNS: dict[str, np.dtype[Any]] = {
    "source_index": np.dtype("<i8"),
    "offsets": np.dtype("<i8"),
    "sizes": np.dtype("<i8"),
    "heights": np.dtype("<i4"),
    "widths": np.dtype("<i4"),
    "labels": np.dtype("<i4"),
}
_CHECKSUMS = np.dtype("<u4")
_TABLES = ("sources", "keys")
# What schema 2 and before took for an image; all else it left aside.
_EARLIER_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Rejected(NamedTuple):
    """An image that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifest:
    """Where every image of a data set lies and what its header says; N rows, row number = instance id.

    Attributes:
        root: The folder, or the URL of one, that `sources` are relative to. Not part of the fingerprint: data may move.
        sources: Tar files or image files, posix paths relative to `root` (absolute, or URLs, where outside of it).
        keys: N unique, readable names: the image's path, or the member's name inside its tar file.
        source_index: int64 (N,), the source that holds the row.
        offsets: int64 (N,), bytes from the start of the source to the image; 0 for plain files.
        sizes: int64 (N,), bytes of the encoded image.
        heights: int32 (N,), pixels of the picture as shown, or as stored where `upright` is False.
        widths: int32 (N,), likewise.
        labels: int32 (N,), index into `class_names`, -1 where unlabeled.
        class_names: Empty without labels.
        rejected: The images left out. Not part of the fingerprint.
        checksums: uint32 (N,), CRC-32 of the first, middle and last 4 kB of each image; None for manifests of schema 1
            and 2, whose fingerprint does not cover what the images hold.
        upright: Whether images are turned as their EXIF orientation says. False for manifests of schema 1: runs
            that began with one resume without turning.

    Raises:
        DataError: The columns differ in length or type.
    """

    root: Place
    sources: StringTable
    keys: StringTable
    source_index: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    class_names: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    checksums: npt.NDArray[np.uint32] | None = None
    upright: bool = True

    def __post_init__(self) -> None:
        for name, dtype in self._columns.items():
            column = getattr(self, name)
            if column.shape != (len(self),) or column.dtype != dtype:
                raise DataError(
                    f"column {name} is {column.dtype} {column.shape}, expected {dtype} ({len(self)},)"
                )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_labels(self) -> bool:
        """Whether the rows belong to named classes."""
        return bool(self.class_names)

    @property
    def _schema(self) -> int:
        if self.checksums is not None:
            return SCHEMA
        return _WITHOUT_CHECKSUMS if self.upright else _NOT_TURNED

    @property
    def _columns(self) -> dict[str, np.dtype[Any]]:
        return _COLUMNS if self.checksums is None else {**_COLUMNS, "checksums": _CHECKSUMS}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all but `root` and `rejected`: where it is equal, so are the instance ids."""
        digest = hashlib.sha256(json.dumps([self._schema, self.class_names]).encode())
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.size};".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def name(self, row: int) -> str:
        """What to call a row in messages: `train.tar!cat/0001.png`, or the path of a plain file; escaped."""
        key, source = self.keys[row], self.sources[int(self.source_index[row])]
        return printable(key if key == source or key.startswith(f"{source}!") else f"{source}!{key}")

    def select(self, rows: npt.NDArray[np.int64], rejected: Sequence[Rejected] = ()) -> Self:
        """Return a manifest of the given rows, int64 (M,), in that order.

        `rejected` is appended to those left out already. The rows get new instance ids, 0 to M - 1.
        """
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in self._columns}
        return replace(self, keys=self.keys.take(rows), rejected=(*self.rejected, *rejected), **columns)

    def of_classes(self, names: Sequence[str]) -> Self:
        """Return a manifest of the images of some classes, renumbered in the order of `names`.

        Args:
            names: The classes; those that this manifest lacks have no images.
        """
        numbers = np.full(len(self.class_names) + 1, -1)  # the last one is that of label -1
        for number, name in enumerate(names):
            if name in self.class_names:
                numbers[self.class_names.index(name)] = number
        labels = numbers[np.asarray(self.labels)]
        rows = np.flatnonzero(labels >= 0)
        return replace(
            self.select(rows), labels=labels[rows].astype(self.labels.dtype), class_names=tuple(names)
        )

    def by_the_rules_of(self, earlier: "Manifest") -> Self:
        """Return this manifest as the version that wrote `earlier` would have built it, as far as that is known.

        Where the images are the same, so are the fingerprints then. Images of endings that it did not take are left
        out, classes without images have a number again, and where it turned no images, sizes are those stored.
        """
        if earlier.checksums is not None:
            return self
        given = replace(self, checksums=None)
        if len(given) > len(earlier):
            rows = [row for row, key in enumerate(given.keys) if _was_taken(key, given._is_file(row))]
            given = given.select(np.array(rows, np.int64))
        if not earlier.class_names:
            given = replace(given, labels=np.full_like(given.labels, -1), class_names=())
        elif set(given.class_names) < set(earlier.class_names) and (given.labels >= 0).all():
            given = given.of_classes(earlier.class_names)
        if earlier.upright or len(earlier) != len(given):
            return given
        swapped = (given.heights == earlier.widths) & (given.widths == earlier.heights)
        return replace(
            given,
            heights=np.where(swapped, given.widths, given.heights),
            widths=np.where(swapped, given.heights, given.widths),
            upright=False,
        )

    def file(self, row: int) -> Path | None:
        """The local file that is the image of a row; None where it is a member of a tar or lies at a URL."""
        path = below(self.root, self.sources[int(self.source_index[row])])
        return path if isinstance(path, Path) and self._is_file(row) else None

    def _is_file(self, row: int) -> bool:
        return self.keys[row] == self.sources[int(self.source_index[row])]

    def save(self, directory: Path | str) -> None:
        """Write the manifest into `directory` (made if missing, replaced if it holds one).

        `manifest.arrow` has a row per image, and `sources.arrow` one per source, in Arrow's file format (Feather);
        names are bytes. `meta.json` is written last: a directory without it is not a manifest.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _META).unlink(missing_ok=True)
        columns = {name.removesuffix("s"): getattr(self, name) for name in self._columns}
        rows = pa.record_batch({"key": self.keys.to_arrow(), **columns})
        for name, batch in ((_SOURCES, pa.record_batch({"source": self.sources.to_arrow()})), (_ROWS, rows)):
            # A memory-mapped manifest may be saved over its own files, which stay until they are replaced.
            with (
                written_whole(directory / name) as partial,
                partial.open("wb") as file,  # Arrow opens no path that is not UTF-8
                pa.ipc.new_file(file, batch.schema) as writer,
            ):
                writer.write_batch(batch)
        self._save_meta(directory)

    def save_root(self, directory: Path | str) -> None:
        """Note where the images are now in `directory`, which holds this manifest with another root.

        At any moment there is a whole manifest.
        """
        self._save_meta(Path(directory))

    def _save_meta(self, directory: Path) -> None:
        meta = {
            "schema": self._schema,
            "root": str(self.root.absolute()),
            "class_names": self.class_names,
            "rejected": self.rejected,
        }
        with written_whole(directory / _META) as partial:
            partial.write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, directory: Path | str, root: Place | str | None = None) -> Self:
        """Open a saved manifest; its arrays are memory-mapped, read-only.

        Args:
            directory: Where `save` wrote it.
            root: Where the data lies now, if it moved since.

        Raises:
            DataError: Nothing whole was saved there, or by another version.
        """
        directory = Path(directory)
        try:
            meta = json.loads((directory / _META).read_text())
            if meta["schema"] not in (_NOT_TURNED, _WITHOUT_CHECKSUMS, SCHEMA):
                raise DataError(f"schema {meta['schema']}, expected {_NOT_TURNED} to {SCHEMA}")
            columns = (*_COLUMNS, "checksums") if meta["schema"] == SCHEMA else tuple(_COLUMNS)
            is_arrow = (directory / _SOURCES).exists()
            fields = _from_arrow(directory, columns) if is_arrow else _from_numpy(directory)
            return cls(
                root=place(meta["root"] if root is None else root),
                class_names=tuple(meta["class_names"]),
                rejected=tuple(Rejected(*entry) for entry in meta["rejected"]),
                upright=meta["schema"] != _NOT_TURNED,
                **fields,
            )
        except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory} holds no usable manifest: {error}; build it again") from error

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays = {name: getattr(self, name) for name in self._columns}
        for name in _TABLES:
            table: StringTable = getattr(self, name)
            arrays |= {f"{name}.blob": table.blob, f"{name}.bounds": table.bounds}
        return arrays


def _was_taken(key: str, is_file: bool) -> bool:
    """Whether schema 2 and before took an image; of a member of a tar its name had to have a single dot."""
    last = key.rpartition("/")[2].lower()
    return last.endswith(_EARLIER_ENDINGS) and (is_file or last.count(".") == 1)


def _from_arrow(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    rows, sources = (
        pa.ipc.open_file(pa.memory_map(os.fsencode(directory / name))).get_batch(0)
        for name in (_ROWS, _SOURCES)
    )
    columns = {name: rows[name.removesuffix("s")].to_numpy() for name in names}
    return {
        **columns,
        "keys": StringTable.of_arrow(rows["key"]),
        "sources": StringTable.of_arrow(sources["source"]),
    }


def _from_numpy(directory: Path) -> dict[str, Any]:
    """Open a manifest of version 0.1.0, which kept every array in a file of its own."""

    def load(name: str) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.load(directory / f"{name}.npy", mmap_mode="r")
        return array.view(np.ndarray)

    tables = {name: StringTable(load(f"{name}.blob"), load(f"{name}.bounds")) for name in _TABLES}
    return {**{name: load(name) for name in _COLUMNS}, **tables}
