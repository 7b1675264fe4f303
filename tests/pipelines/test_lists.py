import csv
import os
from pathlib import Path

import pytest

from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.manifest import Rejected
from tests.pipelines.stored import content_of, png, write_files, write_tar


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
    (tmp_path / "x.txt").write_bytes(b"a.png\nb\0.png\n")
    with pytest.raises(DataError, match=r"line 2: holds a zero byte, expected a list of paths as UTF-8 text"):
        build_manifest(tmp_path / "x.txt")


@pytest.mark.parametrize(
    "text",
    [
        "a b.png,cat\nc.png,dog\n",
        "a b.png, cat\n\nc.png dog\n",
        '"a b.png",cat\n"c.png",dog\n',
        "a b.png;cat\nc.png;dog\n",
        "path,label\na b.png,cat\nc.png,dog\n",
        "filename\tcategory\na b.png\tcat\nc.png\tdog\n",
        "image class\na b.png cat\nc.png dog\n",
        "label,image\ncat,a b.png\ndog,c.png\n",
    ],
)
def test_text_lists_have_labels_in_any_usual_form(tmp_path: Path, text: str) -> None:
    write_files(tmp_path, "a b.png", "c.png")
    manifest = build_manifest(write(tmp_path / "x.txt", text))
    assert list(manifest.keys) == ["a b.png", "c.png"]
    assert [manifest.class_names[label] for label in manifest.labels] == ["cat", "dog"]


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\nb.jpg,cat\n",
        "Image Path,Class\nb.jpg,cat\n",
        "img,breed\nb.jpg,cat\n",
        ",path,width,label\n0,b.jpg,5,cat\n",
        "id;species;filename\n0;cat;b.jpg\n",
        "label\tpath\ncat\tb.jpg\n",
        "b.jpg;cat\n",
        "b.jpg,cat,\n",
    ],
)
@pytest.mark.parametrize("encode", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_have_a_header_by_any_usual_name(tmp_path: Path, text: str, encode: str) -> None:
    write_files(tmp_path, "b.jpg")
    (tmp_path / "x.csv").write_bytes(text.replace("\n", "\r\n").encode(encode))
    manifest = build_manifest(tmp_path / "x.csv")
    assert (list(manifest.keys), manifest.class_names) == (["b.jpg"], ("cat",))


def test_a_table_without_a_column_of_labels_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path, "a.png")
    assert not build_manifest(write(tmp_path / "x.csv", "file,width,height\na.png,5,3\n")).has_labels
    assert "no labels, as none of its columns file, width, height is called label or class" in caplog.text


def test_an_unknown_header_is_taken_for_a_path_and_explained(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    with pytest.raises(
        DataError, match=r"e\.g\. fichier; .* if the first line names the columns, call them path"
    ):
        build_manifest(write(tmp_path / "x.csv", "fichier,classe\na.png,0\n"))


def test_names_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    names = ["a,b.png", 'c"d.png', "e\nf.png", "g\u2028h.png"]
    write_files(tmp_path, *names)
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([name, "cat"] for name in names)
    assert list(build_manifest(tmp_path / "x.csv").keys) == names
    assert list(build_manifest(write(tmp_path / "x.txt", f"{names[0]}\n{names[3]}\n")).keys) == names[::3]


def test_a_folder_above_a_linked_one_is_not_mistaken(tmp_path: Path) -> None:
    write_files(tmp_path / "far", "deep/1.png", content=png(1, 1))
    write_files(tmp_path / "far", "x.png", content=png(2, 2))
    write_files(tmp_path / "near", "x.png", "plain/1.png", content=png(3, 3))
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "deep")
    text = "plain/../x.png\nlink/../x.png\nlink/1.png\n../near/plain/../plain/1.png\n"
    manifest = build_manifest(write(tmp_path / "near" / "x.txt", text))
    assert list(manifest.keys) == ["x.png", "link/../x.png", "link/1.png", "../near/plain/1.png"]
    assert manifest.heights.tolist() == [3, 2, 1, 3]


def test_what_is_no_file_is_rejected(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "folder.png/b.png")
    os.mkfifo(tmp_path / "pipe.png")
    manifest = build_manifest(write(tmp_path / "x.txt", "pipe.png\nfolder.png\na.png\n"))
    assert dict(manifest.rejected) == {
        "pipe.png": "a pipe, socket or device, expected a file",
        "folder.png": "a folder, expected a file",
    }


def test_a_list_of_tars(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / "shards" / f"{number}.tar", {f"{number}.png": png()})
    path = write(tmp_path / "x.txt", "shards/{0..1}.tar\nshards/2.tar\n")
    assert list(build_manifest(path).keys) == ["0.png", "1.png", "2.png"]
    with pytest.raises(DataError, match=r"line 2: got 'a\.png', expected a \.tar file as in the first line"):
        build_manifest(write(tmp_path / "x.txt", "shards/0.tar\na.png\n"))
    with pytest.raises(DataError, match=r"got 1 tar files, not found: .*7\.tar"):
        build_manifest(write(tmp_path / "x.txt", "shards/7.tar\n"))


def test_what_is_no_image_is_rejected(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    write_files(tmp_path, "b.png", content=b"")
    manifest = build_manifest(write(tmp_path / "x.txt", "b.png 1\na.png 0\n"))
    assert list(manifest.keys) == ["a.png"]
    assert manifest.labels.tolist() == [0]
    assert manifest.rejected == (Rejected("b.png", "empty (0 bytes)"),)
