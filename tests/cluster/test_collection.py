"""Collections: rows come and go by blocks, readers see one state, a kill leaves the state before or after."""

from __future__ import annotations

import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cluster.collection import BlockEntry, open_collection
from cluster.collection_writer import (
    Change,
    commit,
    delete_leftovers,
    merged,
    runs_to_merge,
    taken_names,
    without,
    write_block,
    written_block,
)
from cluster.errors import SnapshotError
from tests.cluster.collection_changes import BLOCK_ROWS, DIM, add, assert_holds, change, vectors

ROOT = Path(__file__).resolve().parents[2]
KEYS = [f"key{number}" for number in range(40)]


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "collection")
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def test_any_sequence_of_changes_leaves_what_it_should(url: str) -> None:
    keys, opened = list[str](), None
    for number in range(40):
        keys = change(url, opened, keys, number)
        opened = open_collection(url)
        assert_holds(opened, keys, number)
        assert opened.generation == number + 1


def test_a_reader_keeps_its_state_through_the_next_change(url: str) -> None:
    before = add(url, None, KEYS, 0)
    halved = commit(
        url, before, Change(blocks=without(before, np.arange(0, 40, 2)), attributes={"number": 1})
    )
    runs = runs_to_merge(halved.blocks, BLOCK_ROWS, everything=True)
    after = commit(url, halved, Change(blocks=merged(halved, runs, BLOCK_ROWS), attributes={"number": 2}))
    reader = pickle.loads(pickle.dumps(halved))
    assert reader.read("keys").tolist() == after.read("keys").tolist() == KEYS[1::2]
    np.testing.assert_array_equal(reader.read("rows"), vectors(KEYS[1::2]))
    commit(url, after, Change(blocks=after.blocks))
    with pytest.raises(SnapshotError, match="missing; open the index again if it was changed"):
        pickle.loads(pickle.dumps(open_collection(url).__class__(url, halved.document))).read("rows")


def test_rows_are_read_by_ranges_and_by_numbers(url: str) -> None:
    collection = add(url, None, KEYS, 0)
    collection = commit(url, collection, Change(blocks=without(collection, np.array([0, 15, 16, 39]))))
    left = [key for row, key in enumerate(KEYS) if row not in (0, 15, 16, 39)]
    rows = vectors(left)
    for start, stop in [(0, 36), (0, 0), (36, 36), (13, 15), (14, 14), (5, 30)]:
        np.testing.assert_array_equal(collection.read("rows", start, stop), rows[start:stop])
    chosen = np.array([30, 2, 2, 14, 13, 0])
    np.testing.assert_array_equal(collection.read_rows("rows", chosen), rows[chosen])
    assert collection.read_rows("keys", chosen).tolist() == [left[row] for row in chosen]
    assert collection.read_rows("rows", np.array([], np.int64)).shape == (0, DIM)
    with pytest.raises(ValueError, match="got rows 0 to 37 of a collection of 36"):
        collection.read("rows", 0, 37)
    with pytest.raises(SnapshotError, match="no table 'other'"):
        collection.read("other")


def test_keys_are_found(url: str) -> None:
    collection = add(url, None, KEYS, 0)
    collection = commit(url, collection, Change(blocks=without(collection, np.array([3]))))
    asked = ["key5", "nothing", "key0", "key3", "key39", "key5"]
    assert collection.find(asked).tolist() == [4, -1, 0, -1, 38, 4]
    assert collection.find([]).tolist() == []


def test_everything_may_be_removed_and_come_back(url: str) -> None:
    collection = add(url, None, KEYS, 0)
    emptied = commit(url, collection, Change(blocks=without(collection, np.arange(40))))
    assert emptied.num_rows == 0
    assert emptied.read("rows").shape == (0, DIM)
    assert emptied.find(KEYS).tolist() == [-1] * 40
    assert_holds(add(url, emptied, KEYS, 7), KEYS, 7)


def test_a_block_that_is_there_is_not_written_again(url: str) -> None:
    for key in ("first", "second"):
        write_block(url, "same", {"rows": vectors([key]), "keys": [key]}, note=[key])
    found = written_block(url, "same")
    assert found == (BlockEntry("same", 1), ["first"])
    assert written_block(url, "other") is None


@pytest.mark.parametrize("piece", ["rows/c.0.0", "COMMIT.json"])
def test_a_damaged_block_is_written_again(tmp_path: Path, piece: str) -> None:
    url = str(tmp_path)
    write_block(url, "block", {"rows": vectors(KEYS), "keys": KEYS})
    next((tmp_path / "blocks").rglob(piece)).write_bytes(b"{")
    assert written_block(url, "block") is None
    write_block(url, "block", {"rows": vectors(KEYS), "keys": KEYS})
    assert written_block(url, "block") is not None


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    collection = add(str(tmp_path), None, KEYS, 0)
    commit(str(tmp_path), collection, Change(blocks=without(collection, np.array([3]))))
    needed = [path for path in tmp_path.rglob("*") if path.is_file() and "STATE" not in path.name]
    for path in needed:
        content = path.read_bytes()
        for wrong in (None, content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            path.unlink()
            if wrong is not None:
                path.write_bytes(wrong)
            faults = list(open_collection(str(tmp_path)).verify())
            path.write_bytes(content)
            if path.parent.name != "files" or path.name.endswith("-000001"):
                assert faults, path
    assert list(open_collection(str(tmp_path)).verify()) == []


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    add(str(tmp_path), None, KEYS, 0)
    state = tmp_path / "STATE.json"
    state.write_bytes(state.read_bytes().replace(b'"generation": 1', b'"generation": 2'))
    with pytest.raises(SnapshotError, match="checksum differs; restore it from a copy"):
        open_collection(str(tmp_path))
    with pytest.raises(SnapshotError, match="never finished"):
        open_collection(str(tmp_path / "nothing"))


def test_of_two_changes_to_one_state_the_second_is_refused(url: str) -> None:
    before = add(url, None, KEYS, 0)
    commit(url, before, Change(blocks=before.blocks))
    with pytest.raises(SnapshotError, match="another process has changed it"):
        commit(url, before, Change(blocks=()))
    with pytest.raises(SnapshotError, match="another process has changed it"):
        add(url, None, KEYS, 1)
    assert open_collection(url).num_rows == 40


def test_what_is_no_longer_needed_goes(tmp_path: Path) -> None:
    url = str(tmp_path)
    collection = add(url, None, KEYS, 0)
    write_block(url, "interrupted", {"rows": vectors(KEYS), "keys": KEYS})
    write_block(url, "merged-interrupted", {"rows": vectors(KEYS), "keys": KEYS})
    for _ in range(3):
        collection = commit(url, collection, Change(blocks=without(collection, np.array([0]))))
    names = {path.name for path in (tmp_path / "blocks").iterdir()}
    assert names == {"added-0-0", "added-0-16", "added-0-32", "interrupted"}
    assert len(list((tmp_path / "removed").iterdir())) == 2
    assert "interrupted" not in taken_names(collection)
    delete_leftovers(collection)
    assert not (tmp_path / "blocks" / "interrupted").exists()
    assert list(collection.verify()) == []


def test_what_is_merged() -> None:
    def blocks(*sizes: int, removed: int = 0) -> list[BlockEntry]:
        return [BlockEntry(str(size), size, removed) for size in sizes]

    full, small = blocks(100), blocks(10)
    assert runs_to_merge([*full, *small * 32], 100) == []
    assert runs_to_merge([*full, *small * 33, *full], 100) == [(1, 34)]
    assert runs_to_merge([*full, *small * 2, *full, *small], 100, everything=True) == [(1, 3)]
    assert runs_to_merge([*full, *blocks(100, removed=25), *full], 100) == []
    assert runs_to_merge([*full, *blocks(100, removed=26), *full], 100) == [(1, 2)]
    assert runs_to_merge([*full, *blocks(100, removed=1)], 100, everything=True) == [(1, 2)]


def test_many_small_changes_copy_a_row_a_few_times(tmp_path: Path) -> None:
    """Appending is not slower for many rows: what is merged is a constant per row added."""
    url, copied, collection = str(tmp_path), 0, None
    for number in range(80):
        collection = add(url, collection, [f"{number}/{each}" for each in range(4)], number)
        runs = runs_to_merge(collection.blocks, 64)
        if runs:
            counts: list[int] = []
            collection = commit(url, collection, Change(blocks=merged(collection, runs, 64, counts.append)))
            copied += sum(counts)
    assert copied <= 2 * 320
    assert len(collection.blocks) <= 33 + 320 / 32


@pytest.mark.slow
def test_a_kill_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    moments, url = random.Random(0), str(tmp_path / "collection")
    keys, number = list[str](), 0
    for _ in range(4):
        (tmp_path / "keys.txt").write_text("\n".join(keys))
        arguments = [url, str(tmp_path / "keys.txt"), str(number)]
        with subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.collection_changes", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == number
            time.sleep(moments.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            counted = [number, *map(int, process.stdout.read().split())]
        killed = open_collection(url)
        reached = killed.attributes["number"]
        assert reached in (counted[-1], counted[-1] + 1)  # nothing that counted is lost
        keys = _replayed(tmp_path / "replayed", reached)
        assert_holds(killed, keys, reached)
        number = reached + 1


def _replayed(folder: Path, last: int) -> list[str]:
    """The keys after all changes up to one, made in a collection that nothing interrupts."""
    shutil.rmtree(folder, ignore_errors=True)
    keys, opened = list[str](), None
    for number in range(last + 1):
        keys = change(str(folder), opened, keys, number)
        opened = open_collection(str(folder))
    return keys
