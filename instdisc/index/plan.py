"""Which images of a manifest an index lacks, and which of its rows they replace."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.collection import Collection
from instdisc.index.images import Root, describe, same_content, same_place, stored_sources
from pipelines.manifest import Manifest
from pipelines.places import is_url
from pipelines.strings import printable


class Plan(NamedTuple):
    """What to do about the images of a manifest.

    Attributes:
        rows: int64 (M,), ascending, the images to embed.
        keys: What each of them is to be called, M.
        replaced: int64, ascending: rows of the index whose image changed.
        present: Images that the index has as they are.
    """

    rows: npt.NDArray[np.int64]
    keys: list[str]
    replaced: npt.NDArray[np.int64]
    present: int


def plan_images(index: Collection | None, manifest: Manifest, roots: Sequence[Root], root: int) -> Plan:
    """Compare images with those of an index, by key, file and content; none is read.

    An image is called by its key in the manifest. Where the index calls another file so, whose content differs, it is
    called by its full path.

    Args:
        index: What is there; None for nothing.
        manifest: The images.
        roots: The folders of the index.
        root: Which of them is the manifest's.

    Raises:
        SnapshotError: The index cannot be read.
    """
    keys = [printable(key) for key in manifest.keys]
    if index is None or not index.num_rows:
        return Plan(np.arange(len(manifest)), keys, np.array([], np.int64), 0)
    wanted, replaced = np.ones(len(manifest), bool), list[int]()
    undecided = np.arange(len(manifest))
    for may_rename in (True, False):
        found = index.find([keys[row] for row in undecided.tolist()])
        there = undecided[found >= 0]
        found = found[found >= 0]
        chosen = manifest.select(there)
        described = describe(index, found)
        same = same_content(manifest, there, described)
        at_home = same_place(stored_sources(chosen, [keys[row] for row in there.tolist()]), root, described)
        wanted[there[same]] = False
        replaced += found[~same & (at_home | (not may_rename))].tolist()
        undecided = there[~same & ~at_home]
        if not may_rename or not len(undecided):
            break
        for row in undecided.tolist():
            keys[row] = _full_name(manifest, row, roots[root])
    rows = np.flatnonzero(wanted)
    return Plan(
        rows,
        [keys[row] for row in rows.tolist()],
        np.unique(np.array(replaced, np.int64)),
        len(manifest) - len(rows),
    )


def _full_name(manifest: Manifest, row: int, root: Root) -> str:
    name = manifest.name(row)
    return name if name.startswith("/") or is_url(name) else f"{printable(root.name)}/{name}"


def find_removed(index: Collection, named: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """The rows to remove, int64, ascending, and the names among `named` that stand for none.

    Args:
        index: What is there.
        named: Keys as the index has them, or patterns, in which `*`, `?` and `[…]` stand for any characters.
    """
    found = index.find(named)
    rows = set(found[found >= 0].tolist())
    unknown = [name for name, row in zip(named, found.tolist(), strict=True) if row < 0]
    patterns = [name for name in unknown if set("*?[") & set(name)]
    if patterns:
        matched = _match(index, patterns)
        rows |= {row for each in matched.values() for row in each}
        unknown = [name for name in unknown if not matched.get(name)]
    # A name that is not UTF-8, or holds a backslash, may have been given as it is rather than as it is printed.
    raw = {name: printable(name) for name in unknown if printable(name) != name}
    again = dict(zip(raw, index.find(list(raw.values())).tolist(), strict=True))
    rows |= {row for row in again.values() if row >= 0}
    unknown = [name for name in unknown if again.get(name, -1) < 0]
    return np.array(sorted(rows), np.int64), unknown


def _match(index: Collection, patterns: Sequence[str]) -> dict[str, list[int]]:
    matchers = {pattern: re.compile(fnmatch.translate(pattern)) for pattern in patterns}
    matched: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for number in range(len(index.blocks)):
        start, stop = index.bounds_of(number)
        for row, key in enumerate(index.read("keys", start, stop), start):
            for pattern, matcher in matchers.items():
                if matcher.match(key):
                    matched[pattern].append(row)
    return matched
