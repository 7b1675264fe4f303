from pathlib import Path

import pytest

from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.manifest import Rejected
from tests.pipelines.stored import content_of, png, write_files


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_paths_alone_keep_their_order(tmp_path: Path) -> None:
    write_files(tmp_path, "data/b 1.png", "data/a.png", "outside.png")
    outside = tmp_path / "outside.png"
    manifest = build_manifest(write(tmp_path / "data" / "x.txt", f"b 1.png\r\n\r\n./a.png\n{outside}\n"))
    assert list(manifest.keys) == ["b 1.png", "a.png", outside.as_posix()]
    assert not manifest.has_labels
    assert content_of(manifest, 2) == png()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.txt", "a b.png\ttabby cat\nc.png dog\nd.png\n"),
        ("x.csv", "a b.png,tabby cat\nc.png,dog\nd.png,\n"),
        ("x.csv", '\ufeffpath,label\r\n"a b.png", tabby cat\r\nc.png,dog\r\n\r\nd.png\r\n'),
    ],
)
def test_class_names(tmp_path: Path, name: str, text: str) -> None:
    write_files(tmp_path, "a b.png", "c.png", "d.png")
    manifest = build_manifest(write(tmp_path / name, text))
    assert list(manifest.keys) == ["a b.png", "c.png", "d.png"]
    assert manifest.class_names == ("dog", "tabby cat")
    assert manifest.labels.tolist() == [1, 0, -1]
    assert not build_manifest(tmp_path / name, labels="none").has_labels


@pytest.mark.parametrize(("name", "separator"), [("x.txt", " "), ("x.csv", ",")])
def test_class_numbers(tmp_path: Path, name: str, separator: str) -> None:
    write_files(tmp_path, "a.png", "b.png")
    manifest = build_manifest(write(tmp_path / name, f"b.png{separator}3\na.png{separator}0\n"))
    assert manifest.labels.tolist() == [3, 0]
    assert manifest.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "x.txt is empty"),
        ("x.txt", "a.png\nno image\n", "line 2: got 'no image', expected the path of an image"),
        ("x.txt", "a.png 1\nb.png -1\n", "line 2: class number -1, expected 0, 1"),
        ("x.txt", "a.png\nb.png\n./a.png\n", r"lines 1 and 3: a\.png is named twice"),
        (
            "x.txt",
            "a.png\nc.png\nd.png\n",
            r"2 of 3 files do not exist, e\.g\. c\.png, d\.png; paths are taken",
        ),
        ("x.csv", "a.png,1,2\n", "line 1: got .*, expected `path` or `path,label`"),
        ("x.csv", "path,label\n,cat\n", "line 2: got .*, expected `path`"),
        ("x.csv", 'a.png,1\n"b.png,2\n', "line 2: unexpected end of data"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_files(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=message):
        build_manifest(write(tmp_path / name, text))


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    (tmp_path / "x.txt").write_bytes(b"a.png\n\xff\xfe.png\n")
    with pytest.raises(DataError, match=r"line 2: b'.*' is not UTF-8 text"):
        build_manifest(tmp_path / "x.txt")


def test_what_is_no_image_is_rejected(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    write_files(tmp_path, "b.png", content=b"")
    manifest = build_manifest(write(tmp_path / "x.txt", "b.png 1\na.png 0\n"))
    assert list(manifest.keys) == ["a.png"]
    assert manifest.labels.tolist() == [0]
    assert manifest.rejected == (Rejected("b.png", "empty (0 bytes)"),)
