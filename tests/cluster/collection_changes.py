"""A collection that is changed again and again, each change a function of its number and the keys that are there."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.collection import Collection, open_collection
from cluster.collection_writer import (
    Change,
    chunks,
    commit,
    delete_leftovers,
    merged,
    runs_to_merge,
    taken_names,
    without,
    write_block,
    written_block,
)
from cluster.storage import Storage

DIM, BLOCK_ROWS = 5, 16


def vectors(keys: list[str]) -> NDArray[np.float32]:
    """The rows of keys, each a function of its key."""
    rows = [np.random.default_rng(list(key.encode())).normal(size=DIM) for key in keys]
    return np.array(rows, np.float32).reshape(len(keys), DIM)


def add(url: str, before: Collection | None, keys: list[str], number: int) -> Collection:
    """Append rows; those that are there are replaced by new ones of the same key."""
    blocks = []
    for start, stop in chunks(len(keys), BLOCK_ROWS):
        name = f"added-{number}-{start}"
        while name in taken_names(before):
            name += "x"
        part = keys[start:stop]
        write_block(url, name, {"rows": vectors(part), "keys": part}, note=len(part))
        written = written_block(url, name)
        assert written is not None
        assert written[1] == len(part)
        blocks.append(written[0])
    kept = []
    if before is not None:
        there = before.find(keys)
        kept = without(before, np.sort(there[there >= 0]))
    attributes = {"step": 1, "number": number}
    files = {"note.txt": str(number).encode()}
    return commit(url, before, Change(blocks=[*kept, *blocks], attributes=attributes, files=files))


def change(url: str, before: Collection | None, keys: list[str], number: int) -> list[str]:
    """Make one change to a collection with these keys in this order; returns the keys afterwards."""
    rng = random.Random(number)
    kind = rng.choice(["add", "remove", "merge", "all"]) if before is not None and before.num_rows else "add"
    if kind == "add":
        added = [f"new{number}/é{each}" for each in range(rng.randint(1, 60))]
        again = rng.sample(keys, min(len(keys), rng.randint(0, 4)))
        add(url, before, [*added, *again], number)
        return [*(key for key in keys if key not in again), *added, *again]
    assert before is not None
    if kind == "remove":
        gone = sorted(rng.sample(range(len(keys)), rng.randint(1, max(1, len(keys) // 2))))
        removed = Change(
            blocks=without(before, np.array(gone)),
            attributes={"number": number},
            files={"note.txt": str(number).encode()},
        )
        commit(url, before, removed)
        return [key for row, key in enumerate(keys) if row not in gone]
    runs = runs_to_merge(before.blocks, BLOCK_ROWS, everything=kind == "all")
    blocks = merged(before, runs, BLOCK_ROWS)
    files = {"note.txt": str(number).encode()}
    after = commit(url, before, Change(blocks=blocks, attributes={"number": number}, files=files))
    if kind == "all":
        delete_leftovers(after)
    return keys


def assert_holds(collection: Collection, keys: list[str], number: int) -> None:
    """The collection is whole, and just what the change of this number leaves."""
    assert list(collection.verify()) == []
    assert collection.attributes["number"] == number
    assert collection.read_file("note.txt") == str(number).encode()
    assert collection.read("keys").tolist() == keys
    np.testing.assert_array_equal(collection.read("rows"), vectors(keys))


def change_until_killed(url: str, keys: list[str], number: int) -> None:
    """Make one change after another, and say so when each counts."""
    while True:
        before = open_collection(url) if Storage.at(url).exists("STATE.json") else None
        keys = change(url, before, keys, number)
        print(number, flush=True)
        number += 1


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text().splitlines()
    change_until_killed(sys.argv[1], lines, int(sys.argv[3]))
