"""One state of an index as it is served: which rows are searched, and what is known of each."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cluster.collection import Collection, hash_keys
from cluster.live_topk import SearchedTable
from instdisc.evaluation.source import Source
from instdisc.index.images import EMBEDDINGS, KEYS
from instdisc.settings.evaluation import StoredReadout
from pipelines.decode import CorruptImage
from pipelines.errors import DataError
from pipelines.headers import HeaderError, checksum, image_size
from pipelines.kinds import open_image
from pipelines.places import below
from pipelines.reader import ImageReader

_SHOWN_BY_BROWSERS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
}
_FILTERS_KEPT, _PICTURES_KEPT = 32, 4096


class Encoded(NamedTuple):
    """A picture for a browser."""

    data: bytes
    kind: str
    """MIME type."""


class NoPictureError(Exception):
    """There is none; says why, in a few words without a path."""


@dataclass(eq=False)
class State:
    """A state of an index.

    Attributes:
        source: The index.
        tables: Its rows, by read-out.
        keys: Strings (N,).
    """

    source: Source
    tables: dict[StoredReadout, SearchedTable]
    keys: pa.LargeStringArray

    def __post_init__(self) -> None:
        self._hashes = hash_keys(self.keys.to_pylist())
        self._order = np.argsort(self._hashes)
        self._hashes = self._hashes[self._order]
        self._reader = ImageReader(self.source.train)
        self.labels = self.source.labels
        self.whitening = self.source.whitening
        self.filtered = lru_cache(_FILTERS_KEPT)(self._filtered)
        self.thumbnail = lru_cache(_PICTURES_KEPT)(self._thumbnail)

    @property
    def index(self) -> Collection:
        """The index."""
        assert self.source.index is not None
        return self.source.index

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.keys)

    def row_of(self, key: str) -> int | None:
        """The row of a key, None if there is none."""
        try:
            (wanted,) = hash_keys([key])
        except UnicodeEncodeError:
            return None
        first, last = (int(np.searchsorted(self._hashes, wanted, side=side)) for side in ("left", "right"))
        return next((row for row in self._order[first:last].tolist() if self.key(row) == key), None)

    def key(self, row: int) -> str:
        """What the image of a row is called."""
        return str(self.keys[row].as_py())

    def label(self, row: int) -> str | None:
        """The name of its class, None if it has none."""
        number = int(self.labels[row])
        return self.source.class_names[number] if number >= 0 else None

    @cached_property
    def classes(self) -> list[tuple[str, int]]:
        """Names of the classes that have images, and how many."""
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.source.class_names))
        return [
            (name, count)
            for name, count in zip(self.source.class_names, counts.tolist(), strict=True)
            if count
        ]

    def vector(self, row: int) -> npt.NDArray[np.float32]:
        """The vector of a row, float32 (D,)."""
        return np.asarray(self.index.read_rows(EMBEDDINGS, np.array([row]))[0].astype(np.float32))

    def _filtered(self, text: str, label: str | None) -> npt.NDArray[np.int64]:
        """Rows whose key or label holds a text, whatever its case, and that are of a class, int64, ascending."""
        names = np.array([*self.source.class_names, ""], object)
        kept = np.ones(self.num_rows, bool)
        if text:
            kept = np.array(pc.match_substring(self.keys, text, ignore_case=True))
            kept |= np.array([text.lower() in name.lower() for name in names])[self.labels]
        if label is not None:
            kept = kept & (names[self.labels] == label)
        return np.flatnonzero(kept)

    def _thumbnail(self, row: int, side: int) -> Encoded:
        """The picture of a row with at most so many pixels on its longer side; see `image`."""
        data = self._data(row)
        try:
            picture = self._reader.decode(row, data)
        except CorruptImage as error:
            raise NoPictureError("the image cannot be decoded") from error
        picture.thumbnail((side, side))
        return encoded(picture)

    def image(self, row: int) -> Encoded:
        """The image of a row as it is where browsers show it, otherwise as a PNG.

        Raises:
            NoPictureError: It is not where it was, or is not the image that was embedded.
        """
        data = self._data(row)
        try:
            with open_image(data) as opened:
                kind = _SHOWN_BY_BROWSERS.get(opened.format or "")
            return Encoded(data, kind) if kind else encoded(self._reader.decode(row, data), "PNG")
        except Exception as error:  # Pillow's readers raise almost anything
            raise NoPictureError("the image cannot be decoded") from error

    def _data(self, row: int) -> bytes:
        """The bytes of an image, if they are of the one that was embedded, whatever lies in its place now."""
        manifest = self.source.train
        try:
            data = self._reader.read(row)
            found = image_size(lambda count: data[:count], len(data))
        except (HeaderError, CorruptImage, DataError) as error:
            raise NoPictureError("the image is not where it was, or has changed since") from error
        same = found == (int(manifest.heights[row]), int(manifest.widths[row]))
        if manifest.checksums is not None:
            total = checksum(lambda start, count: data[start : start + count], len(data))
            same = same and total == int(manifest.checksums[row])
        if not same:
            raise NoPictureError("the image has changed since it was embedded")
        return data

    def is_where_it_was(self, row: int) -> bool:
        """Whether the file of an image is there; of one at a URL that is taken for granted."""
        manifest = self.source.train
        path = below(manifest.root, manifest.sources[int(manifest.source_index[row])])
        return not isinstance(path, Path) or path.exists()

    def close(self) -> None:
        """Close all files."""
        self._reader.close()


def encoded(image: Image.Image, kind: str | None = None) -> Encoded:
    """A picture as PNG where it is small, as JPEG otherwise, unless told."""
    kind = kind or ("PNG" if max(image.size) <= 64 else "JPEG")
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    return Encoded(buffer.getvalue(), f"image/{kind.lower()}")


def read_keys(index: Collection) -> pa.LargeStringArray:
    """The keys of an index."""
    return pa.array(index.read(KEYS).tolist(), pa.large_string())


def describe(state: State) -> dict[str, Any]:
    """What a page wants to know first."""
    shape, dtype = state.index.tables[EMBEDDINGS]
    model = state.index.attributes["model"]
    return {
        "name": state.index.url.rstrip("/").rpartition("/")[2],
        "rows": state.num_rows,
        "dimensions": shape[1],
        "dtype": dtype,
        "generation": state.index.generation,
        "model": {name: model[name] for name in ("run", "step", "weights", "backbone")},
        "readouts": list(state.tables),
        "classes": [{"name": name, "images": count} for name, count in state.classes],
    }
