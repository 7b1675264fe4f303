import os
from pathlib import Path

import pytest

from pipelines.build import build_manifest
from pipelines.errors import DataError
from pipelines.manifest import Manifest, Rejected
from tests.pipelines.stored import content_of, png, write_files


def test_class_folders_give_labels(tmp_path: Path) -> None:
    write_files(tmp_path, "dog/2.png", "dog/1.png", "cat/deep/er/1.JPG", "notes/readme.txt", ".git/x.png")
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == ["cat/deep/er/1.JPG", "dog/1.png", "dog/2.png"]
    assert manifest.class_names == ("cat", "dog", "notes")  # an empty class keeps its number
    assert manifest.labels.tolist() == [0, 1, 1]
    assert manifest.heights.tolist() == [3, 3, 3]
    assert manifest.widths.tolist() == [5, 5, 5]
    assert manifest.name(0) == "cat/deep/er/1.JPG"
    assert content_of(manifest, 2) == png()


def test_an_image_directly_in_the_folder_means_no_labels(tmp_path: Path) -> None:
    write_files(tmp_path, "dog/2.png", "cat/1.png", "top.png")
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == ["cat/1.png", "dog/2.png", "top.png"]
    assert manifest.labels.tolist() == [-1, -1, -1]
    assert not manifest.has_labels


def test_one_folder_alone_is_no_class_unless_asked_for(tmp_path: Path) -> None:
    write_files(tmp_path, "images/1.png", "images/2.png")
    assert not build_manifest(tmp_path).has_labels
    assert build_manifest(tmp_path, labels="folders").class_names == ("images",)


def test_labels_can_be_ignored(tmp_path: Path) -> None:
    write_files(tmp_path, "dog/2.png", "cat/1.png")
    assert not build_manifest(tmp_path, labels="none").has_labels


def test_images_outside_of_classes_are_an_error_if_classes_are_asked_for(tmp_path: Path) -> None:
    write_files(tmp_path, "dog/2.png", "cat/1.png", "top.png")
    with pytest.raises(DataError, match=r"1 images, e\.g\. top\.png, lie directly in"):
        build_manifest(tmp_path, labels="folders")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    write_files(tmp_path, "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(DataError, match=r"\(train, val\) are splits, expected classes; give one of them"):
        build_manifest(tmp_path)
    assert len(build_manifest(tmp_path, labels="none")) == 2


def test_names_that_differ_in_the_extension_are_two_images(tmp_path: Path) -> None:
    assert list(build_manifest(write_files(tmp_path, "a.png", "a.jpg")).keys) == ["a.jpg", "a.png"]


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", "1.png")
    root = write_files(tmp_path / "root", "cat/1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    assert list(build_manifest(root).keys) == ["cat/1.png", "dog/1.png"]


def test_links_do_not_multiply_images(tmp_path: Path) -> None:
    root = write_files(tmp_path / "root", "a/1.png", "b/2.png")
    (root / "a" / "link").symlink_to("../b")
    (root / "b" / "link").symlink_to("../a")
    assert list(build_manifest(root).keys) == ["a/1.png", "b/2.png"]
    write_files(tmp_path / "elsewhere", "3.png", "deep/4.png")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    for name in ("0", "c"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    assert list(build_manifest(root).keys) == ["0/3.png", "0/deep/4.png", "a/1.png", "b/2.png"]


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    manifest = build_manifest(write_files(tmp_path, name))
    assert content_of(manifest, 0) == png()
    manifest.save(tmp_path / "manifest")
    assert Manifest.load(tmp_path / "manifest").keys[0] == name


def test_what_is_no_image_is_rejected_by_name(tmp_path: Path) -> None:
    write_files(tmp_path, "a/good.png", "b/good.png")
    write_files(tmp_path, "a/empty.png", content=b"")
    write_files(tmp_path, "b/html.jpg", content=b"<html>")
    write_files(tmp_path, "b/cut.png", content=png()[:20])
    (tmp_path / "b" / "dangling.png").symlink_to("nowhere")
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == ["a/good.png", "b/good.png"]
    assert manifest.labels.tolist() == [0, 1]
    assert manifest.rejected == (
        Rejected("a/empty.png", "empty (0 bytes)"),
        Rejected("b/cut.png", "cut short: its 20 bytes end inside the header"),
        Rejected("b/dangling.png", "No such file or directory"),
        Rejected(
            "b/html.jpg",
            "not an image, or one of a form that Pillow cannot read: 6 bytes, the first are b'<html>'",
        ),
    )


def test_no_image_left_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.png", content=b"")
    with pytest.raises(DataError, match=r"none of 2 images can be used, e\.g\. a\.png: empty"):
        build_manifest(tmp_path)


def test_no_image_at_all_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for \.bmp, .*\.webp; found no files at all"):
        build_manifest(tmp_path)
    write_files(tmp_path, "a.npy", "b.npy", "sub/README")
    with pytest.raises(DataError, match=r"found 2 \.npy, 1 no extension"):
        build_manifest(tmp_path)


def test_order_and_fingerprint_follow_the_names_alone(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "ab" for number in range(20)]
    one = build_manifest(write_files(tmp_path / "one", *names))
    two = build_manifest(write_files(tmp_path / "two", *reversed(names)))
    assert one.root != two.root
    assert one.fingerprint == two.fingerprint
    write_files(tmp_path / "two", "a/3.png", content=png() + b"\0")
    assert build_manifest(tmp_path / "two").fingerprint != one.fingerprint
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    assert build_manifest(tmp_path / "one").fingerprint != one.fingerprint
