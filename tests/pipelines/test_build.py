import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.build import build_manifest
from pipelines.errors import DataError
from tests.pipelines.stored import png, write_files, write_tar


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "*.tar", "train-{000..009}.tar"):
        with pytest.raises(DataError, match=r"nothing at .*expected a folder of images, WebDataset"):
            build_manifest(path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    write_files(tmp_path, "a.parquet", "b.tar.gz")
    with pytest.raises(DataError, match=r"a\.parquet is a \.parquet file; expected a folder"):
        build_manifest(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"matches .*a\.parquet, expected only \.tar files"):
        build_manifest(tmp_path / "*")


def test_missing_tars_of_a_list(tmp_path: Path) -> None:
    for paths in ([], [tmp_path / "a.tar"]):
        with pytest.raises(DataError, match=f"got {len(paths)} tar files, not found: "):
            build_manifest(paths)


def test_patterns_with_braces(tmp_path: Path) -> None:
    for name in ("08", "09", "10", "x"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png()})
    for path in (
        tmp_path / "{08..10}.tar",
        str(tmp_path / "{10..08}.tar"),
        [tmp_path / "0{8,9}.tar", tmp_path / "1*.tar"],
    ):
        assert list(build_manifest(path).keys) == ["08.png", "09.png", "10.png"]
    assert len(build_manifest(tmp_path / "{0?,x}.tar")) == 3
    with pytest.raises(DataError, match=r"names 4 files, of which 1 are missing, e\.g\. .*07\.tar"):
        build_manifest(tmp_path / "{07..10}.tar")
    with pytest.raises(DataError, match="names more than 10,000,000 files"):
        build_manifest(tmp_path / "{0..99999999}.tar")
    write_tar(tmp_path / "{0..9}.tar", {"braces.png": png()})
    assert list(build_manifest(tmp_path / "{0..9}.tar").keys) == ["braces.png"]


def test_a_list_of_image_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b.png", "a.png")]
    write_files(tmp_path, "a.png", "b.png")
    assert list(build_manifest(paths).keys) == [str(path) for path in paths]
    with pytest.raises(DataError, match=r"b\.png is given twice"):
        build_manifest([*paths, tmp_path / "." / "b.png"])


def test_tars_and_images_side_by_side(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": png()})
    write_files(tmp_path, "1.png")
    with pytest.raises(DataError, match="holds 1 tar files and 1 images, expected one kind"):
        build_manifest(tmp_path)


def test_class_folders_are_asked_of_what_is_no_folder(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png")
    write_tar(tmp_path / "x.tar", {"1.png": png()})
    (tmp_path / "x.txt").write_text("1.png\n")
    build_manifest(write_tar(tmp_path / "y.tar", {"a/1.png": png(), "b/2.png": png()}), labels="folders")
    for name in ("x.tar", "x.txt"):
        with pytest.raises(DataError, match="is for folders of images"):
            build_manifest(tmp_path / name, labels="folders")


def test_progress_goes_to_standard_error_and_only_if_it_takes_long(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, *(f"{number}.png" for number in range(10)))
    build_manifest(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_no_column_depends_on_the_machine(tmp_path: Path) -> None:
    manifest = build_manifest(write_files(tmp_path, "1.png"))
    assert manifest.offsets.dtype == np.dtype("<i8")
    assert manifest.labels.dtype == np.dtype("<i4")


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_files(tmp_path, "1.png"))
    with pytest.raises(DataError, match="got an empty path; expected a folder of images"):
        build_manifest("")
    assert len(build_manifest(".")) == 1


def test_reasons_of_the_operating_system(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png")
    with pytest.raises(DataError, match=r"1\.png/deeper .*: Not a directory; expected a folder"):
        build_manifest(tmp_path / "1.png" / "deeper")
    for path in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "*.tar", [tmp_path / ("x" * 300)]):
        with pytest.raises(DataError, match="File name too long"):
            build_manifest(path)
    (tmp_path / "gone.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.tar.*: No such file or directory"):
        build_manifest(tmp_path / "gone.tar")


@pytest.mark.parametrize("name", ["", "red"], ids=["the data itself", "one of its folders"])
def test_a_folder_that_may_not_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / name
    closed.mkdir(exist_ok=True)

    def refusing(listing: Callable[[str], Any]) -> Callable[[str], Any]:
        def list_folder(path: str) -> Any:
            if Path(path) == closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return listing(path)

        return list_folder

    for call in ("listdir", "scandir"):  # pathlib uses either, by the version of Python
        monkeypatch.setattr(os, call, refusing(getattr(os, call)))  # the superuser may read everything
    with pytest.raises(DataError, match=f"Permission denied.*{closed.name}|{closed.name}.*Permission denied"):
        build_manifest(tmp_path)
