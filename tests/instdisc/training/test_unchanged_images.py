"""A run that resumes lists its images again only where their files have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from instdisc.runs.run_directory import RunDirectory
from tests.instdisc.program import Run, picture, write_pictures


def epochs(number: int) -> list[str]:
    return ["--training.epochs", str(number)]


def replace_unnoticed(path: Path) -> None:
    """Change an image, but neither its size nor its time."""
    times, size = path.stat(), path.stat().st_size
    picture(1000).convert("L").save(path)
    content = path.read_bytes()
    assert len(content) < size
    path.write_bytes(content.ljust(size, b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_images_are_listed_again_only_where_their_files_changed(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 16, classes=2)
    first = images / "class0" / "000.png"
    assert run(images, *epochs(1))[0] == 0
    out = RunDirectory(tmp_path / "out")
    begun = out.images.read_text()

    first.touch()
    status, said, _ = run(images, *epochs(2))
    assert status == 0, said  # listed again, and the same
    touched = out.images.read_text()
    assert touched != begun

    replace_unnoticed(first)
    status, said, _ = run(images, *epochs(3))
    assert status == 0, said  # not listed: it would have been noticed
    status, said, _ = run(images, *epochs(4), "--data.rescan")
    assert status == 2
    assert "fingerprint" in said

    picture(99).save(images / "class0" / "099.png")
    status, said, _ = run(images, *epochs(4))
    assert status == 2
    assert "the images are 16 with fingerprint" in said
    assert out.images.read_text() == touched


def test_without_a_witness_they_are_listed_again(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 16)
    assert run(images, *epochs(1))[0] == 0
    out = RunDirectory(tmp_path / "out")
    whole = out.images.read_text()
    (witness,) = json.loads(whole).values()
    found = out.unchanged_images(witness)
    assert found is not None
    assert len(found[0]) == 16
    for content in ("", "[]", '{"witness": 3}', whole.replace(witness, witness[::-1])):
        out.images.write_text(content)
        assert out.unchanged_images(witness) is None
    out.images.unlink()  # as in a run that an earlier version began
    assert out.unchanged_images(witness) is None
    status, said, _ = run(images, *epochs(2))
    assert status == 0, said
    assert out.images.read_text() == whole
