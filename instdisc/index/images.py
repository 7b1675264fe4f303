"""The images of an index: what it keeps of each beside its vector, and the way back to a manifest.

Keys are kept as `pipelines.strings.printable` writes them. Where images lie is kept as a root and a path below it, so
that they may move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.collection import Collection
from pipelines.manifest import Manifest
from pipelines.places import Place, below, place
from pipelines.strings import StringTable, printable, unprinted

EMBEDDINGS, KEYS, LABELS = "embeddings", "keys", "labels"
_SIZES, _ROOTS, _SOURCES, _OFFSETS, _BYTES, _CHECKSUMS = (
    "image_sizes",
    "roots",
    "sources",
    "offsets",
    "encoded_sizes",
    "checksums",
)
_UNKNOWN = -1  # the checksum of an image of a manifest that has none


@dataclass(frozen=True)
class Root:
    """A folder that images lie below.

    Attributes:
        name: Where it was when images were first added from it; part of keys, so it stays.
        path: Where it is now.
    """

    name: str
    path: str


def roots_of(index: Collection) -> list[Root]:
    """The folders of an index."""
    return [Root(name, path) for name, path in index.attributes["roots"]]


def with_root(roots: Sequence[Root], path: Place) -> tuple[list[Root], int]:
    """The folders of an index with one more, unless it is among them, and its number."""
    text = str(path.absolute())
    for number, root in enumerate(roots):
        if root.path == text:
            return list(roots), number
    name = text
    while name in {root.name for root in roots}:  # others were there before they moved
        name += "+"
    return [*roots, Root(name, text)], len(roots)


def columns(
    manifest: Manifest, keys: Sequence[str], labels: npt.NDArray[np.int32], root: int
) -> dict[str, Any]:
    """The tables of an index for all images of a manifest, but for their vectors.

    Args:
        manifest: N images.
        keys: What they are called in the index, N.
        labels: int32 (N,), in the numbers of the index.
        root: The number of the manifest's root in the index.
    """
    return {
        KEYS: list(keys),
        LABELS: labels,
        _SIZES: np.stack([manifest.heights, manifest.widths], axis=1),
        _ROOTS: np.full(len(manifest), root, np.int32),
        _SOURCES: stored_sources(manifest, keys),
        _OFFSETS: np.asarray(manifest.offsets),
        _BYTES: np.asarray(manifest.sizes),
        _CHECKSUMS: checksums(manifest),
    }


def stored_sources(manifest: Manifest, keys: Sequence[str]) -> list[str]:
    """The file of each image, below the root; empty where its key says the same."""
    names = [printable(source) for source in manifest.sources]
    sources = [names[number] for number in manifest.source_index.tolist()]
    return ["" if source == key else source for source, key in zip(sources, keys, strict=True)]


def checksums(manifest: Manifest) -> npt.NDArray[np.int64]:
    """The checksum of each image, int64, -1 where the manifest has none."""
    if manifest.checksums is None:
        return np.full(len(manifest), _UNKNOWN, np.int64)
    return manifest.checksums.astype(np.int64)


def describe(index: Collection, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """What tells whether some images of an index are those of a manifest: file, root, size and checksum of each."""
    read = _reader(index, rows)
    return {name: read(name) for name in (_SOURCES, _ROOTS, _BYTES, _CHECKSUMS)}


def same_content(
    manifest: Manifest, rows: npt.NDArray[np.int64], there: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.bool_]:
    """Whether images of a manifest hold what those described hold, as far as their checksums tell, bool (M,)."""
    ours, theirs = checksums(manifest)[rows], there[_CHECKSUMS]
    same = (ours == theirs) | (ours == _UNKNOWN) | (theirs == _UNKNOWN)
    return np.asarray(same & (manifest.sizes[rows] == there[_BYTES]))


def same_place(
    sources: Sequence[str], root: int, there: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.bool_]:
    """Whether images lie in the files of those described, bool (M,)."""
    return np.asarray((there[_ROOTS] == root) & (there[_SOURCES] == np.array(sources, object)))


def manifest_of(index: Collection, rows: npt.NDArray[np.int64] | None = None) -> Manifest:
    """The images of an index as a manifest.

    Args:
        index: Where they are.
        rows: int64 (M,), which ones; all by default.

    Raises:
        SnapshotError: A piece is missing or damaged.
    """
    read = _reader(index, rows)
    roots = roots_of(index)
    keys, sources = list[str](), dict[str, int]()
    source_index = np.empty(len(numbers := read(_ROOTS)), np.int64)
    for row, (key, inside, number) in enumerate(
        zip(map(unprinted, read(KEYS)), map(unprinted, read(_SOURCES)), numbers.tolist(), strict=True)
    ):
        source = str(below(place(roots[number].path), inside or key)) if number else inside or key
        source_index[row] = sources.setdefault(source, len(sources))
        keys.append(key if inside else source)  # a plain file is called by its path
    sizes, sums = read(_SIZES), read(_CHECKSUMS)
    return Manifest(
        root=place(roots[0].path),
        sources=StringTable.of(sources),
        keys=StringTable.of(keys),
        source_index=source_index,
        offsets=read(_OFFSETS),
        sizes=read(_BYTES),
        heights=np.ascontiguousarray(sizes[:, 0]),
        widths=np.ascontiguousarray(sizes[:, 1]),
        labels=read(LABELS),
        class_names=tuple(index.attributes["class_names"]),
        checksums=None if (sums == _UNKNOWN).any() else sums.astype(np.uint32),
        upright=bool(index.attributes["upright"]),
    )


def _reader(index: Collection, rows: npt.NDArray[np.int64] | None) -> Any:
    def read(name: str) -> npt.NDArray[Any]:
        return index.read(name) if rows is None else index.read_rows(name, rows)

    return read
