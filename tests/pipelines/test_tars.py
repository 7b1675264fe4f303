import gzip
import io
import tarfile
from pathlib import Path

import pytest

from pipelines.build import build_manifest
from pipelines.errors import DataError
from tests.pipelines.stored import content_of, png, write_tar


def test_webdataset_layout(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "train.tar",
        {
            "./dog/1.jpg": png(1, 2),
            "./dog/1.cls": b"7\n",
            "0002.cls": b"0",
            "0002.json": b"{}",
            "0002.PNG": png(3, 4),
            "0003.png": png(5, 6),
            "0002.seg.png": png(9, 9),
            "._0002.png": b"resource fork",
        },
    )
    manifest = build_manifest(path)
    assert list(manifest.keys) == ["dog/1.jpg", "0002.PNG", "0003.png"]
    assert manifest.labels.tolist() == [7, 0, -1]
    assert manifest.class_names == tuple("01234567")
    assert [content_of(manifest, row) for row in range(3)] == [png(1, 2), png(3, 4), png(5, 6)]
    assert manifest.name(0) == "train.tar!dog/1.jpg"
    assert not build_manifest(path, labels="none").has_labels


def test_labels_are_those_of_class_folders(tmp_path: Path) -> None:
    names = ("data/img/dog/1.png", "data/img/cat/deep/2.png", "data/img/dog/3.png")
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {each: png() for each in names})
    manifest = build_manifest(tmp_path)
    assert manifest.class_names == ("cat", "dog")
    assert manifest.labels.tolist() == [1, 0, 1] * 2
    assert not build_manifest(tmp_path, labels="none").has_labels
    for members in ({"dog/1.png": png()}, {"dog/1.png": png(), "cat/2.png": png(), "3.png": png()}):
        assert not build_manifest(write_tar(tmp_path / "other" / "c.tar", members)).has_labels
        with pytest.raises(
            DataError, match='labels="folders" is for folders of images, or tar files of such'
        ):
            build_manifest(tmp_path / "other" / "c.tar", labels="folders")
    write_tar(tmp_path / "d" / "d.tar", {"dog/1.png": png(), "cat/2.png": png(), "cat/2.cls": b"4"})
    assert build_manifest(tmp_path / "d").labels.tolist() == [-1, 4]


def test_labels_in_json_members(tmp_path: Path) -> None:
    def labels_of(key: str, *contents: bytes) -> tuple[tuple[str, ...], list[int]]:
        members = {f"{number}.json": content for number, content in enumerate(contents)}
        members |= {f"{number}.png": png() for number in range(len(contents) + 1)} | {"0.cls": b"9"}
        manifest = build_manifest(write_tar(tmp_path / "x.tar", members), label_key=key)
        return manifest.class_names, manifest.labels.tolist()

    named = [b'{"label": "dog"}', b'{"label": null}', b"{}", b'{"label": "cat"}']
    assert labels_of("label", *named) == (("cat", "dog"), [1, -1, -1, 0, -1])
    assert labels_of("a.b", b'{"a": {"b": 2}}', b'{"a.b": 0.0}') == (("0", "1", "2"), [2, 0, -1])
    for content, message in (
        (b"{", r"x\.tar!0\.json is not JSON"),
        (b'{"label": [1]}', r"x\.tar!0\.json holds \[1\] at 'label', expected a class number or name"),
        (b'{"other": 1}', "no image has a .json member of its name with a label at 'label'"),
        (b"[]", "no image has a .json member of its name with a label at 'label'"),
    ):
        with pytest.raises(DataError, match=message):
            labels_of("label", content)


def test_names_of_several_dots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"a.b.png": b"0", "a.c.png": b"1", "d.png": b"2", "d.mask.png": b"3", "v1.2/e.f.png": b"4"}
    path = write_tar(
        tmp_path / "x.tar",
        {name: png() for name in members}
        | {"a.b.cls": b"1", "a.cls": b"2", "d.cls": b"3", "v1.2/e.cls": b"4"},
    )
    manifest = build_manifest(path)
    assert list(manifest.keys) == ["a.b.png", "a.c.png", "d.png", "v1.2/e.f.png"]
    assert manifest.labels.tolist() == [1, 2, 3, 4]
    assert "left aside: 1 .png (a field beside the image of the same key)" in caplog.text


def test_tars_joined_by_cat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write_tar(tmp_path / "1.tar", {"a.png": png(1, 1), "a.cls": b"0", "b.png": png(2, 2)}).read_bytes()
    two = write_tar(tmp_path / "2.tar", {"a.png": png(3, 3), "a.cls": b"1", "b.cls": b"2"}).read_bytes()
    (tmp_path / "x" / "x.tar").parent.mkdir()
    (tmp_path / "x" / "x.tar").write_bytes(one + bytes(1 << 20) + two)
    manifest = build_manifest(tmp_path / "x")
    assert list(manifest.keys) == ["a.png", "b.png", "a.png#2"]
    assert manifest.labels.tolist() == [0, 2, 1]
    assert [content_of(manifest, row) for row in range(3)] == [png(1, 1), png(2, 2), png(3, 3)]
    (tmp_path / "x" / "x.tar").write_bytes(one + two[:1200])
    with pytest.raises(DataError, match=r"x\.tar.*cut short"):
        build_manifest(tmp_path / "x")
    assert not caplog.records
    (tmp_path / "x" / "x.tar").write_bytes(one + b"what else" * 100)
    assert len(build_manifest(tmp_path / "x")) == 2
    assert "the 900 bytes after its end mark are not a tar archive" in caplog.text


def test_what_macos_and_others_add_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("1.PNG", "._1.PNG", "__MACOSX/._1.png", "a/__MACOSX/2.png", "readme", "1.txt", ".DS_Store")
    manifest = build_manifest(write_tar(tmp_path / "x.TAR", {name: png() for name in names}))
    assert list(manifest.keys) == ["1.PNG"]
    assert (
        "1 images taken; left aside: 2 .png (__MACOSX), 1 .png (hidden), 1 without ending, 1 .txt"
        in caplog.text
    )
    assert list(build_manifest(tmp_path).keys) == ["1.PNG"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, format: int) -> None:
    name = "/".join(["a long näme"] * 30) + ".png"
    manifest = build_manifest(write_tar(tmp_path / "x.tar", {name: png(), "b.png": png(7, 7)}, format))
    assert list(manifest.keys) == [name, "b.png"]
    assert [content_of(manifest, row) for row in range(2)] == [png(), png(7, 7)]


def test_several_tars_as_folder_pattern_or_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2, 1, 0):
        write_tar(
            tmp_path / "shards" / f"train-{number}.tar", {f"{number}.png": png(), f"{number}.cls": b"1"}
        )
    by_folder = build_manifest(tmp_path / "shards")
    assert list(by_folder.keys) == ["0.png", "1.png", "2.png"]
    assert by_folder.name(2) == "train-2.tar!2.png"
    paths = [tmp_path / "shards" / f"train-{number}.tar" for number in (1, 0, 2)]
    assert build_manifest(paths).fingerprint == by_folder.fingerprint
    assert build_manifest(str(tmp_path / "shards" / "train-*.tar")).fingerprint == by_folder.fingerprint
    monkeypatch.chdir(tmp_path)
    assert build_manifest("shards/train-?.tar").fingerprint == by_folder.fingerprint
    assert build_manifest("**/*.tar").fingerprint == by_folder.fingerprint


def test_sources_are_relative_to_the_common_folder(tmp_path: Path) -> None:
    for name in ("a/x.tar", "b/x.tar"):
        write_tar(tmp_path / "data" / name, {f"{name[0]}.png": png()})
    manifest = build_manifest(tmp_path / "data" / "*" / "x.tar")
    assert manifest.root == tmp_path / "data"
    assert list(manifest.sources) == ["a/x.tar", "b/x.tar"]


def test_equal_names_in_two_tars_are_told_apart(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"1.png": png(), f"only-in-{name[0]}.png": png()})
    manifest = build_manifest(tmp_path)
    assert list(manifest.keys) == [
        "a.tar!1.png",
        "a.tar!only-in-a.png",
        "b.tar!1.png",
        "b.tar!only-in-b.png",
    ]
    assert manifest.name(2) == "b.tar!1.png"


def test_classes_are_named_by_a_file_beside(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": png(), "1.cls": b"1"})
    (tmp_path / "classnames.txt").write_text("cat\nhot dog\ncow\n")
    assert build_manifest(tmp_path / "x.tar").class_names == ("cat", "hot dog", "cow")
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"classnames\.txt names 1 classes, but the tar files hold class 1"):
        build_manifest(tmp_path / "x.tar")


def test_broken_members_are_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"good.png": png(), "empty.jpg": b"", "text.jpg": b"hello"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "good.png"
        tar.addfile(link)
    manifest = build_manifest(tmp_path / "x.tar")
    assert list(manifest.keys) == ["good.png"]
    assert [name for name, _ in manifest.rejected] == [
        "x.tar!empty.jpg",
        "x.tar!text.jpg",
        "x.tar!link.png",
    ]
    assert "a link" in manifest.rejected[2].reason


def test_a_name_twice_in_a_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("1.png")
            member.size = len(png())
            tar.addfile(member, io.BytesIO(png()))
    with pytest.raises(DataError, match=r"x\.tar holds 1\.png twice, at bytes 512 and 1536"):
        build_manifest(tmp_path / "x.tar")


@pytest.mark.parametrize("text", [b"cat", b"", b"-1", b"1.5", b"\xff\xfe"])
def test_a_class_that_is_no_number_is_an_error(tmp_path: Path, text: bytes) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": png(), "1.cls": text})
    with pytest.raises(DataError, match=r"x\.tar!1\.cls holds .*, expected a class number"):
        build_manifest(tmp_path / "x.tar")


def test_an_absurd_class_number_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": png(), "1.cls": b"99999999999"})
    with pytest.raises(DataError, match="class number 99999999999, expected numbers from 0 to 999999"):
        build_manifest(tmp_path / "x.tar")


def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {f"{n}.png": png() for n in range(3)}).read_bytes()
    end = 3 * 1024 + 512  # three members of a header and a block, then the end mark
    for length in [
        0,
        1,
        300,
        512,
        513,
        1023,
        1024,
        1025,
        1536,
        1537,
        2048,
        2500,
        3000,
        3072,
        3073,
        end - 1,
    ]:
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.tar.*(cut short|is not a tar file or is damaged)"):
            build_manifest(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole[:end])
    assert len(build_manifest(tmp_path / "x.tar")) == 3


def test_a_cut_tar_is_named_with_the_position(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {"1.png": png(), "2.png": bytes(5000)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match=r"2\.png takes bytes 1536 to 6536, but the file ends at byte 3000"):
        build_manifest(tmp_path / "x.tar")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "x.tar", {f"{n}.png": png() for n in range(3)}).read_bytes())
    content[1024 + 100] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match="no member and no end mark at byte 1024 of 10240"):
        build_manifest(tmp_path / "x.tar")


def test_a_compressed_tar_is_an_error(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "x.tar", {"1.png": png()}).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed with gzip.*uncompress it first"):
        build_manifest(tmp_path / "x.tar.gz")


def test_tars_without_images_say_what_was_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"n01440764.tar": b"", "n01443537.tar": b""})
    with pytest.raises(DataError, match=r"no images found in .*x\.tar: looked for .*; found 2 \.tar"):
        build_manifest(tmp_path / "x.tar")
