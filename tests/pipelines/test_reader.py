import errno
import os
import resource
from pathlib import Path

import pytest

from pipelines.decode import CorruptImage
from pipelines.errors import DataError
from pipelines.reader import ImageReader
from tests.pipelines.images import photos


def test_reads_what_was_written(tmp_path: Path) -> None:
    manifest = photos(tmp_path, 3)
    reader = ImageReader(manifest)
    for row in (2, 0, 1, 0):
        assert reader.read(row) == (tmp_path / manifest.sources[row]).read_bytes()
    reader.close()
    assert reader.read(1) == (tmp_path / "0001").read_bytes()


def test_too_many_open_files_is_not_the_fault_of_an_image(tmp_path: Path) -> None:
    reader = ImageReader(photos(tmp_path, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(tmp_path, os.O_RDONLY)  # the lowest number that is not in use
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(DataError, match=r"0000: Too many open files; .*ulimit -n"):
            reader.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert reader.read(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_fails_is_not_the_fault_of_an_image(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(number, os.strerror(number))

    reader = ImageReader(photos(tmp_path, 1))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=f"0000: {os.strerror(number)}; the data must lie on storage that"):
        reader.read(0)


def test_one_file_that_may_not_be_read_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    reader = ImageReader(photos(tmp_path, 1))
    monkeypatch.setattr(os, "open", refuse)  # the superuser may read everything
    with pytest.raises(CorruptImage, match="cannot be read: Permission denied"):
        reader.read(0)
