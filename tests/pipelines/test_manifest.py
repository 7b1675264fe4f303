import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from pipelines.errors import DataError
from pipelines.manifest import Manifest, Rejected
from pipelines.strings import StringTable


def make_manifest(**changes: Any) -> Manifest:
    """Two images in a tar and one in a file of its own."""
    fields: dict[str, Any] = {
        "root": Path("/data"),
        "sources": StringTable.of(["train.tar", "more/cat.png"]),
        "keys": StringTable.of(["cat/1.png", "dög/2.png", "more/cat.png"]),
        "source_index": np.array([0, 0, 1], np.int64),
        "offsets": np.array([512, 2048, 0], np.int64),
        "sizes": np.array([100, 200, 300], np.int64),
        "heights": np.array([1, 2, 3], np.int32),
        "widths": np.array([4, 5, 6], np.int32),
        "labels": np.array([0, 1, -1], np.int32),
        "class_names": ("cat", "dög"),
        "rejected": (Rejected("train.tar!cat/3.png", "empty"),),
    }
    return Manifest(**(fields | changes))


def test_names_rows_for_messages() -> None:
    manifest = make_manifest()
    assert [manifest.name(row) for row in range(3)] == [
        "train.tar!cat/1.png",
        "train.tar!dög/2.png",
        "more/cat.png",
    ]
    assert len(manifest) == 3
    assert manifest.has_labels
    assert not make_manifest(class_names=()).has_labels


def test_does_not_repeat_the_tar_of_a_key_that_names_it() -> None:
    keys = StringTable.of(["train.tar!cat/1.png", "train.tar!dög/2.png", "more/cat.png"])
    assert make_manifest(keys=keys).name(0) == "train.tar!cat/1.png"


def test_fingerprint_ignores_where_the_data_lies_and_what_was_rejected() -> None:
    assert make_manifest(root=Path("/elsewhere"), rejected=()).fingerprint == make_manifest().fingerprint
    # Computed once and written down: a saved bank must fit the same data tomorrow.
    assert (
        make_manifest(upright=False).fingerprint
        == "81c06013a1dc0cdb0cc027e627fd8283f58a8eb11bc6a439442fcc8d55ed4e26"
    )


@pytest.mark.parametrize("column", ["source_index", "offsets", "sizes", "heights", "widths", "labels"])
def test_fingerprint_covers_every_column(column: str) -> None:
    changed = getattr(make_manifest(), column).copy()
    changed[1] += 1
    assert make_manifest(**{column: changed}).fingerprint != make_manifest().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ("cat", "dog")},
        {"sources": StringTable.of(["train.tar", "more/cat.jpg"])},
        {"keys": StringTable.of(["cat/1.pngd", "ög/2.png", "more/cat.png"])},
    ],
)
def test_fingerprint_covers_the_strings_and_their_bounds(change: dict[str, Any]) -> None:
    assert make_manifest(**change).fingerprint != make_manifest().fingerprint


def test_fingerprint_covers_what_the_images_hold_if_it_is_known() -> None:
    one, other = (make_manifest(checksums=np.array(sums, np.uint32)) for sums in ([1, 2, 3], [2, 1, 3]))
    assert len({one.fingerprint, other.fingerprint, make_manifest().fingerprint}) == 3
    assert one.by_the_rules_of(make_manifest()).fingerprint == make_manifest().fingerprint
    assert one.by_the_rules_of(other).fingerprint == one.fingerprint


def test_checksums_come_back_and_are_selected(tmp_path: Path) -> None:
    manifest = make_manifest(checksums=np.array([1, 2, 3], np.uint32))
    manifest.save(tmp_path)
    assert_equal(Manifest.load(tmp_path), manifest)
    chosen = manifest.select(np.array([2, 0])).checksums
    assert chosen is not None
    assert chosen.tolist() == [3, 1]


def test_a_run_of_an_earlier_version_finds_what_that_version_found() -> None:
    """Classes without images, none of those inside tars, and no images of endings that it did not know."""
    given = make_manifest(
        keys=StringTable.of(["cat/1.png", "dög/2.avif", "more/cat.png"]), labels=np.array([0, 0, 0], np.int32)
    )
    given = dataclasses.replace(given, class_names=("cat",), checksums=np.zeros(3, np.uint32))
    earlier = make_manifest(labels=np.array([1, 1, 1], np.int32), class_names=("ant", "cat"), upright=False)
    earlier = earlier.select(np.array([0, 2]))
    found = given.by_the_rules_of(earlier)
    assert list(found.keys) == ["cat/1.png", "more/cat.png"]
    assert found.fingerprint == earlier.fingerprint
    unlabeled = dataclasses.replace(earlier, class_names=(), labels=np.array([-1, -1], np.int32))
    assert given.by_the_rules_of(unlabeled).fingerprint == unlabeled.fingerprint


def assert_equal(found: Manifest, expected: Manifest) -> None:
    assert found.fingerprint == expected.fingerprint
    assert (found.root, found.rejected, found.class_names) == (
        expected.root,
        expected.rejected,
        expected.class_names,
    )
    assert [list(found.keys), list(found.sources)] == [list(expected.keys), list(expected.sources)]


def test_comes_back_from_disk_memory_mapped(tmp_path: Path) -> None:
    make_manifest().save(tmp_path / "manifest")
    loaded = Manifest.load(tmp_path / "manifest")
    assert_equal(loaded, make_manifest())
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
    mapped = [range(*(int(end, 16) for end in region[0].split("-"))) for region in regions]
    for array in (loaded.offsets, loaded.labels, loaded.keys.blob, loaded.sources.bounds):
        assert any(array.ctypes.data in region for region in mapped)
        assert not array.flags.writeable


def test_is_a_table_for_other_programs(tmp_path: Path) -> None:
    make_manifest().save(tmp_path)
    rows = feather.read_table(tmp_path / "manifest.arrow").to_pydict()
    assert rows["key"] == [b"cat/1.png", "dög/2.png".encode(), b"more/cat.png"]
    assert (rows["label"], rows["source_index"], rows["offset"]) == ([0, 1, -1], [0, 0, 1], [512, 2048, 0])
    assert feather.read_table(tmp_path / "sources.arrow").to_pydict() == {
        "source": [b"train.tar", b"more/cat.png"]
    }


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    names = ["a.png", b"caf\xe9.png".decode("utf-8", "surrogateescape"), "c.png"]
    make_manifest(keys=StringTable.of(names)).save(tmp_path)
    assert list(Manifest.load(tmp_path).keys) == names


def test_a_directory_whose_name_is_not_utf8(tmp_path: Path) -> None:
    manifest = make_manifest()
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum\xe9"))
    manifest.save(place)
    assert Manifest.load(place).fingerprint == manifest.fingerprint


def test_a_manifest_of_the_first_version_opens(tmp_path: Path) -> None:
    """It kept every array in a file of its own."""
    expected = make_manifest(upright=False)
    expected.save(tmp_path)
    for name in ("manifest.arrow", "sources.arrow"):
        (tmp_path / name).unlink()
    for name in ("source_index", "offsets", "sizes", "heights", "widths", "labels"):
        np.save(tmp_path / f"{name}.npy", getattr(expected, name))
    for name in ("sources", "keys"):
        table = getattr(expected, name)
        np.save(tmp_path / f"{name}.blob.npy", table.blob)
        np.save(tmp_path / f"{name}.bounds.npy", table.bounds)
    assert_equal(Manifest.load(tmp_path), expected)


def test_comes_back_for_data_that_moved(tmp_path: Path) -> None:
    make_manifest().save(tmp_path)
    assert Manifest.load(tmp_path, root="/moved").root == Path("/moved")


def test_an_empty_manifest_comes_back(tmp_path: Path) -> None:
    empty = make_manifest().select(np.zeros(0, np.int64))
    empty.save(tmp_path)
    assert_equal(Manifest.load(tmp_path), empty)


def test_can_be_saved_over_the_files_that_it_is_mapped_from(tmp_path: Path) -> None:
    make_manifest().save(tmp_path)
    loaded = Manifest.load(tmp_path)
    loaded.select(np.array([2, 0])).save(tmp_path)
    assert_equal(loaded, make_manifest())
    assert list(Manifest.load(tmp_path).keys) == ["more/cat.png", "cat/1.png"]


def test_select_renumbers_and_remembers_what_was_rejected() -> None:
    selected = make_manifest().select(np.array([2, 0]), [Rejected("x", "broken")])
    assert [selected.name(row) for row in range(2)] == ["more/cat.png", "train.tar!cat/1.png"]
    assert selected.widths.tolist() == [6, 4]
    assert selected.rejected == (*make_manifest().rejected, Rejected("x", "broken"))


def test_images_of_some_classes() -> None:
    manifest = make_manifest()
    assert (manifest.class_names, manifest.labels.tolist()) == (("cat", "dög"), [0, 1, -1])
    chosen = manifest.of_classes(["eel", "dög"])
    assert (chosen.class_names, chosen.labels.tolist()) == (("eel", "dög"), [1])
    assert chosen.name(0) == manifest.name(1)
    assert len(manifest.of_classes(["eel"])) == 0


def remove_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def remove_rows(folder: Path) -> None:
    (folder / "manifest.arrow").unlink()


def cut_rows(folder: Path) -> None:
    content = (folder / "manifest.arrow").read_bytes()
    (folder / "manifest.arrow").write_bytes(content[:-1])


def swap_column(folder: Path) -> None:
    change_rows(folder, sizes=np.zeros(3, np.int32))


def remove_column(folder: Path) -> None:
    change_rows(folder, sizes=None)


def change_rows(folder: Path, *, sizes: np.ndarray | None) -> None:
    rows = feather.read_table(folder / "manifest.arrow", memory_map=False).drop_columns("size")
    if sizes is not None:
        rows = rows.append_column("size", pa.array(sizes))
    feather.write_feather(rows, folder / "manifest.arrow", compression="uncompressed")


def raise_schema(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"schema": 99}))


def cut_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"schema": 1')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "No such file"),
        (remove_meta, r"No such file.*meta\.json"),
        (remove_rows, r"manifest\.arrow.*No such file"),
        (cut_rows, "Not an Arrow file"),
        (remove_column, "size"),
        (swap_column, r"column sizes is int32 \(3,\), expected int64 \(3,\)"),
        (raise_schema, "schema 99, expected 1 to 3"),
        (cut_meta, "delimiter"),
    ],
)
def test_refuses_what_is_not_whole(tmp_path: Path, damage: Any, message: str) -> None:
    make_manifest().save(tmp_path / "manifest")
    damage(tmp_path / "manifest")
    with pytest.raises(DataError, match=f"manifest holds no usable manifest: .*{message}.*; build it again"):
        Manifest.load(tmp_path / "manifest")


def test_refuses_columns_of_another_type() -> None:
    with pytest.raises(DataError, match=r"column labels is int64 \(3,\), expected int32 \(3,\)"):
        make_manifest(labels=np.zeros(3, np.int64))
