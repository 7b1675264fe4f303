"""What snapshots and collections have in common: tables of the same rows, and small files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Tables(Protocol):
    """Tables that do not change while they are open; picklable. Implemented by `Snapshot` and `Collection`."""

    @property
    def url(self) -> str:
        """Where they are."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells them from others at the same place, earlier and later ones too; JSON values."""

    @property
    def step(self) -> int:
        """The step of training that they are of."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What the writer noted with them, as JSON keeps it."""

    @property
    def num_rows(self) -> int:
        """Rows of every table."""

    @property
    def tables(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name."""

    @property
    def files(self) -> list[str]:
        """Names of the small files."""

    def read(self, table: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start … stop - 1 of a table; see `Snapshot.read`."""

    def read_file(self, name: str) -> bytes:
        """The content of a small file; raises SnapshotError if it is missing or damaged."""


class TableRows:
    """One table as a source of rows for `cluster.topk`; picklable."""

    def __init__(self, tables: Tables, table: str) -> None:
        self._tables, self._table = tables, table

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self._tables.num_rows

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start … stop - 1; raises SnapshotError where a piece is missing or damaged."""
        return self._tables.read(self._table, start, stop)
