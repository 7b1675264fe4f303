"""What looking through folders, lists and tar files gives, before it becomes a manifest."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from tqdm import tqdm

from pipelines.errors import DataError
from pipelines.headers import EXTENSIONS
from pipelines.manifest import Rejected

Labels = Literal["auto", "folders", "none"]
MAX_CLASSES = 1_000_000
_LINE_S = 10.0


class Row(NamedTuple):
    """One image; the fields are those of the manifest."""

    source: int
    key: str
    offset: int
    size: int
    height: int
    width: int
    label: int


class Scan(NamedTuple):
    """All images found, in the order of their instance ids."""

    root: Path
    sources: list[str]
    rows: list[Row]
    class_names: tuple[str, ...]
    rejected: list[Rejected]


def is_image_name(name: str) -> bool:
    """Whether `name`, a path, ends like an image; hidden files do not count."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def nothing_found(where: object, names: Iterable[str]) -> DataError:
    """The error for a place that holds the files `names` but no image."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in names)
    found = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5)) or "no files at all"
    return DataError(
        f"no images found in {where}: looked for {', '.join(sorted(EXTENSIONS))}; "
        f"found {found}; give the place that holds the images"
    )


def numbered_classes(labels: Iterable[int], where: object) -> tuple[str, ...]:
    """Class names "0", "1", … for class numbers; none if no label is above -1.

    Raises:
        DataError: A number is too large to be that of a class.
    """
    count = max(labels, default=-1) + 1
    if count > MAX_CLASSES:
        raise DataError(f"{where}: class number {count - 1}, expected numbers from 0 to {MAX_CLASSES - 1}")
    return tuple(str(number) for number in range(count))


def progress_bar(show: bool, total: int, unit: str) -> "tqdm[None]":
    """Progress on standard error: a bar on a terminal, after a second; elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, unit_scale=True, disable=not show, delay=1.0)
    return _Lines(
        total=total,
        unit=unit,
        unit_scale=True,
        disable=not show,
        delay=_LINE_S,
        mininterval=_LINE_S,
        leave=False,
        ncols=0,
    )


class _Lines(tqdm):  # type: ignore[misc]  # tqdm is not typed
    """Prints lines for a log file, where a bar could not overwrite itself."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state. An empty message asks to clear the bar; a line stays."""
        if msg is None:
            print(self, file=self.fp, flush=True)
