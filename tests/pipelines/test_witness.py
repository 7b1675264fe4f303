"""What a witness of the images notices, and what it costs nothing to notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.witness import witness
from tests.pipelines.images import encode, photo
from tests.pipelines.stored import write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    return tmp_path / "images"


def add(folder: Path) -> None:
    (folder / "dog" / "2.png").write_bytes(b"x")


def add_folder(folder: Path) -> None:
    (folder / "cow").mkdir()
    (folder / "cow" / "1.png").write_bytes(b"x")


def write_again(folder: Path) -> None:
    (folder / "cat" / "1.png").write_bytes(b"y" * 100)


def make_longer_at_the_same_time(folder: Path) -> None:
    path = folder / "cat" / "1.png"
    times = path.stat()
    path.write_bytes(b"x" * 101)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(folder: Path) -> None:
    first, second = folder / "cat" / "1.png", folder / "cat" / "2.png"
    os.utime(second, ns=(1, 1))
    first.rename(folder / "t")
    second.rename(first)
    (folder / "t").rename(second)


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": add,
    "a class": add_folder,
    "removed": lambda folder: (folder / "cat" / "2.png").unlink(),
    "renamed": lambda folder: (folder / "cat" / "2.png").rename(folder / "cat" / "3.png"),
    "another class": lambda folder: (folder / "cat" / "2.png").rename(folder / "dog" / "2.png"),
    "written again": write_again,
    "longer": make_longer_at_the_same_time,
    "swapped": swap,
    "a link to nothing": lambda folder: (folder / "cat" / "4.png").symlink_to("nothing"),
    "a pipe": lambda folder: os.mkfifo(folder / "cat" / "4.png"),
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_folder_is_noticed(change: str, folder: Path) -> None:
    before = witness(folder)
    assert before is not None
    assert before == witness(folder) == witness(str(folder))
    CHANGES[change](folder)
    places = (folder, folder.with_name("elsewhere"))
    assert before not in {witness(place) for place in places if place.exists()}


def test_what_changes_in_tars_is_noticed(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", {f"{number}.png": encode(photo(8, 8, number), "PNG")})
    pattern = str(tmp_path / "train-*.tar")
    seen = {witness(pattern), witness(tmp_path)}
    assert len(seen) == 1
    assert None not in seen
    seen.add(witness(f"{tmp_path}/train-0.tar"))
    (tmp_path / "classnames.txt").write_text("cat\n")
    seen.add(witness(pattern))
    (tmp_path / "classnames.txt").write_text("dog\n")
    seen.add(witness(pattern))
    os.utime(tmp_path / "train-1.tar", ns=(1, 1))
    seen.add(witness(pattern))
    (tmp_path / "train-1.tar").unlink()
    seen.add(witness(pattern))
    assert len(seen) == 6


def test_lists_have_none_and_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("images/cat/1.png\n")
    assert witness(tmp_path / "list.txt") is None
    with pytest.raises(DataError, match="nothing at"):
        witness(tmp_path / "nowhere")
