import os
import socket
from pathlib import Path

import pytest

from pipelines.build import build_manifest, held_out_beside
from pipelines.errors import DataError
from pipelines.manifest import Manifest, Rejected
from tests.pipelines.stored import content_of, png, write_files


def test_class_folders_give_labels(tmp_path: Path) -> None:
    write_files(tmp_path, "dog/2.png", "dog/1.png", "cat/deep/er/1.JPG", "notes/readme.txt", ".git/x.png")
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == ["cat/deep/er/1.JPG", "dog/1.png", "dog/2.png"]
    assert manifest.class_names == ("cat", "dog")
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


@pytest.mark.parametrize("held_out", ["val", "Valid", "VALIDATION", "test"])
def test_one_split_is_trained_on_and_another_held_out(
    held_out: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, "Train/cat/1.png", "Train/dog/deep/2.png", f"{held_out}/cat/3.png", "cover.png")
    write_files(tmp_path, f"{held_out}/dog/4.png", "extra/5.png", "README")
    (tmp_path / "Train" / "empty").mkdir()
    train, test = (build_manifest(tmp_path, split=split) for split in ("train", "held-out"))
    assert (list(train.keys), train.class_names) == (["cat/1.png", "dog/deep/2.png"], ("cat", "dog"))
    assert (list(test.keys), test.class_names) == (["cat/3.png", "dog/4.png"], ("cat", "dog"))
    assert held_out_beside(tmp_path) == tmp_path / held_out
    assert f"training on Train and measuring on {held_out}, which hold the same classes" in caplog.text
    assert "these are the images of Train; also not taken: extra" in caplog.text
    assert len(build_manifest(tmp_path, labels="none")) == 6


def test_of_several_held_out_splits_val_is_taken(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"{split}/{label}/1.png" for split in ("train", "val", "test") for label in "ab"))
    assert held_out_beside(str(tmp_path)) == tmp_path / "val"
    for path in (tmp_path / "val", tmp_path / "val" / "a" / "1.png", [tmp_path], tmp_path / "none"):
        assert held_out_beside(path) is None


@pytest.mark.parametrize("held_out", ["val/fox/2.png", "val/2.png", "valley/cat/2.png"])
def test_folders_that_are_named_like_splits_are_classes_otherwise(held_out: str, tmp_path: Path) -> None:
    write_files(tmp_path, "train/cat/1.png", held_out)
    (tmp_path / "val" / "cat").mkdir(parents=True, exist_ok=True)  # without images
    assert build_manifest(tmp_path).class_names == ("train", held_out.partition("/")[0])
    assert held_out_beside(tmp_path) is None


def test_splits_that_are_taken_for_classes_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, "train/cat/1.png", "test/cat/2.png", "test/fox/3.png")
    assert build_manifest(tmp_path).class_names == ("test", "train")
    assert "test, train are taken for classes, since two of them" in caplog.text


def test_what_is_not_taken_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(
        tmp_path, "cat/1.png", "dog/2.JFIF", "dog/3.heic", "dog/a.pdf", "dog/b.PDF", "cat/name", ".git/x"
    )
    write_files(tmp_path, "__MACOSX/cat/._1.png", "cat/._1.png", "cat/.DS_Store", f"cat/x.{'y' * 99}")
    write_files(tmp_path, "cat/page.jpg", "cat/mail.jpg", content=b"<html>")
    (tmp_path / "empty").mkdir()
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == ["cat/1.png", "dog/2.JFIF", "dog/3.heic"]
    assert manifest.class_names == ("cat", "dog")
    (record,) = caplog.records
    assert record.getMessage().partition("3 images taken; left aside: ")[2] == (
        "2 without ending, 2 .pdf, 2 .jpg (not an image, or one of a form that Pillow cannot read), "
        "1 folder (hidden), 1 folder (__MACOSX), 1 .png (hidden), 1 folder (without usable images)"
    )
    caplog.clear()
    build_manifest(write_files(tmp_path / "clean", "1.png"))
    assert not caplog.records


def test_what_is_no_file_does_not_stop_the_scan(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png", "dog/2.png")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "dog" / "link.gif").symlink_to("../x.png")
    (tmp_path / "dog" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "dog" / "self.png").symlink_to("self.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "dog" / "s.png"))
        manifest = build_manifest(tmp_path)
    assert manifest.class_names == ("cat", "dog")
    assert dict(manifest.rejected) == {
        **dict.fromkeys(
            ("cat/pipe.jpg", "dog/link.gif", "dog/s.png", "dog/zero.png", "x.png"),
            "a pipe, socket or device, expected a file",
        ),
        "dog/self.png": "Too many levels of symbolic links",
    }
    with pytest.raises(DataError, match=r"x\.png is a pipe, socket or device; expected a folder"):
        build_manifest(tmp_path / "x.png")


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
    with pytest.raises(DataError, match=r"looked for the endings of JPEG, .*; found no files at all"):
        build_manifest(tmp_path)
    write_files(tmp_path, "a.npy", "b.npy", "sub/README")
    with pytest.raises(DataError, match=r"found 2 \.npy, 1 without ending"):
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
