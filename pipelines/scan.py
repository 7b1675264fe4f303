"""What looking through folders, lists and tar files gives, before it becomes a manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol

from pipelines.errors import DataError
from pipelines.kinds import EXTENSIONS, KINDS
from pipelines.manifest import Rejected
from pipelines.places import Place

Labels = Literal["auto", "folders", "none"]
MAX_CLASSES = 1_000_000
_LONGEST_ENDING = 16
_MOST_GROUPS = 12
_FOLDERS = "folders"


class Row(NamedTuple):
    """One image; the fields are those of the manifest."""

    source: int
    key: str
    offset: int
    size: int
    height: int
    width: int
    label: int
    checksum: int


class Scan(NamedTuple):
    """All images found, in the order of their instance ids."""

    root: Place
    sources: list[str]
    rows: list[Row]
    class_names: tuple[str, ...]
    rejected: list[Rejected]
    left_aside: LeftAside


class LeftAside:
    """Counts what was found and not taken, by ending and reason."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, reason: str = "") -> None:
        """Count a file; without a reason it is one that does not end like an image."""
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  pathlib is slow for millions of names
        if not 1 < len(ending) <= _LONGEST_ENDING:
            ending = "without ending"
        self._counts[ending, reason] += 1

    def add_folder(self, reason: str) -> None:
        """Count a folder that was not looked into."""
        self._counts[_FOLDERS, reason] += 1

    def update(self, other: LeftAside) -> None:
        """Count what another counted."""
        self._counts.update(other._counts)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        groups = self._counts.most_common(_MOST_GROUPS)
        parts = []
        for (ending, reason), count in groups:
            name = _FOLDERS[:-1] if ending == _FOLDERS and count == 1 else ending
            parts.append(f"{count:,} {name} ({reason})" if reason else f"{count:,} {name}")
        others = self._counts.total() - sum(count for _, count in groups)
        return ", ".join([*parts, f"{others:,} others"] if others else parts)


def is_image_name(name: str) -> bool:
    """Whether `name`, a path, ends like an image; hidden files do not count."""
    return ends_like_an_image(name) and not is_hidden(name)


def ends_like_an_image(name: str) -> bool:
    """Whether a path has one of the usual endings."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122


def is_hidden(name: str) -> bool:
    """Whether the last part of a path starts with a dot; macOS names its resource forks so."""
    return name.startswith(".", name.rfind("/") + 1)


def nothing_found(where: object, left_aside: LeftAside, hint: str = "") -> DataError:
    """The error for a place that holds no image; `hint` is what else may be meant."""
    return DataError(
        f"no images found in {where}: looked for the endings of {', '.join(KINDS)}; "
        f"found {left_aside or 'no files at all'}; "
        f"{hint or 'give the place that holds the images'}"
    )


def number_labels(labels: Sequence[str], where: object) -> tuple[list[int], tuple[str, ...]]:
    """Number labels that are texts: as they are if all of them are whole numbers, else as sorted names.

    Args:
        labels: Empty for none.
        where: For messages.

    Returns:
        The label of each, -1 for none, and the class names.

    Raises:
        DataError: A number is too large to be that of a class.
    """
    given = {label for label in labels if label}
    if all(label.isdecimal() for label in given):
        numbers = [int(label or -1) for label in labels]
        return numbers, numbered_classes(numbers, where)
    class_names = tuple(sorted(given))
    by_name = {name: number for number, name in enumerate(class_names)}
    return [by_name.get(label, -1) for label in labels], class_names


def numbered_classes(labels: Iterable[int], where: object) -> tuple[str, ...]:
    """Class names "0", "1", … for class numbers; none if no label is above -1.

    Raises:
        DataError: A number is too large to be that of a class.
    """
    count = max(labels, default=-1) + 1
    if count > MAX_CLASSES:
        raise DataError(f"{where}: class number {count - 1}, expected numbers from 0 to {MAX_CLASSES - 1}")
    return tuple(str(number) for number in range(count))


class Bar(Protocol):
    """Progress, shown or not."""

    def update(self, n: int = 1) -> None:
        """Count `n` more as done."""


class _NoBar:
    def update(self, n: int = 1) -> None:
        """Nothing."""


def progress_bar(show: bool, total: int, unit: str) -> AbstractContextManager[Bar]:
    """Progress on standard error: a bar on a terminal, after a second; elsewhere a line every ten seconds."""
    if not show:
        return nullcontext(_NoBar())
    from pipelines.bars import shown_bar  # not at the top: without progress tqdm is not needed

    bar: AbstractContextManager[Bar] = shown_bar(total, unit)
    return bar
