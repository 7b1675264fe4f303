"""Paths written as patterns: `shards/train-*.tar`, `train-{0000..0127}.tar`."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from pipelines.errors import DataError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MOST = 10_000_000


def is_pattern(path: str | Path) -> bool:
    """Whether a path is a pattern if nothing has that name."""
    return glob.has_magic(str(path)) or bool(_BRACES.search(str(path)))


def find(pattern: str | Path) -> list[Path]:
    """The files that a pattern stands for, sorted; none if nothing matches.

    `*`, `?`, `[…]` and `**` match what there is. `{0000..0127}` and `{train,extra}` name files that must all exist.

    Raises:
        DataError: Some of the files named by braces are missing, or they are too many to be meant.
    """
    names = expand_braces(str(pattern))
    found = {name: _matches(Path(name)) for name in names}
    missing = [name for name in names if not found[name]]
    if 0 < len(missing) < len(names):
        raise DataError(
            f"{pattern} names {len(names)} files, of which {len(missing)} are missing, e.g. "
            f"{', '.join(missing[:3])}; bring them, or name those that there are"
        )
    return sorted({path for paths in found.values() for path in paths})


def expand_braces(pattern: str) -> list[str]:
    """`{8..10}` to 8, 9, 10, with leading zeros if either number has some; `{a,b}` to a, b; every combination.

    Raises:
        DataError: They are too many to be meant.
    """
    names = [""]
    position = 0
    for match in _BRACES.finditer(pattern):
        first, last, words = match.groups()
        if words is not None:
            alternatives = words.split(",")
        else:
            low, high = sorted((int(first), int(last)))
            if high - low >= _MOST // len(names):
                raise DataError(f"{pattern} names more than {_MOST:,} files; write a shorter range")
            padded = any(text[0] == "0" and len(text) > 1 for text in (first, last))
            width = max(len(first), len(last)) if padded else 0
            alternatives = [f"{number:0{width}d}" for number in range(low, high + 1)]
        names = [
            f"{name}{pattern[position : match.start()]}{each}" for name in names for each in alternatives
        ]
        position = match.end()
    return [name + pattern[position:] for name in names]


def _matches(path: Path) -> list[Path]:
    if path.exists() or not glob.has_magic(str(path)):
        return [path] if path.exists() else []
    return list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
