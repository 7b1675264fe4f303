import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torchvision import datasets

from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from tests.pipelines.stored import content_of

RNG = np.random.default_rng(0)


def write_checked(path: Path, content: bytes) -> list[str]:
    """Write a file; returns its entry for torchvision's table of files and MD5 sums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, hashlib.md5(content).hexdigest()]


def write_cifar(
    monkeypatch: pytest.MonkeyPatch, root: Path, kind: type, sizes: dict[str, int], key: str, meta_key: str
) -> dict[str, tuple[npt.NDArray[np.uint8], list[int]]]:
    """Small files in CIFAR's format, declared in torchvision's tables in place of the real ones."""
    folder = root / kind.base_folder
    batches, entries = {}, {}
    for name, size in sizes.items():
        data = RNG.integers(0, 256, (size, 3072), np.uint8)
        labels = RNG.integers(0, 3, size).tolist()
        entries[name] = write_checked(folder / name, pickle.dumps({"data": data, key: labels}))
        batches[name] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    names = pickle.dumps({meta_key: ["cat", "dög", "hot dog"]})
    meta = write_checked(folder / kind.meta["filename"], names)
    monkeypatch.setattr(kind, "meta", {"filename": meta[0], "key": meta_key, "md5": meta[1]})
    monkeypatch.setattr(kind, "train_list", [entries[name] for name in sizes if not name.startswith("test")])
    monkeypatch.setattr(kind, "test_list", [entries[name] for name in sizes if name.startswith("test")])
    return batches


def assert_holds(manifest: Manifest, pixels: npt.NDArray[np.uint8], labels: list[int]) -> None:
    assert manifest.labels.tolist() == labels
    for row, expected in enumerate(pixels):
        with Image.open(io.BytesIO(content_of(manifest, row))) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_cifar10_is_converted_once_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"data_batch_1": 4, "data_batch_2": 5, "test_batch": 3}
    batches = write_cifar(monkeypatch, tmp_path, datasets.CIFAR10, sizes, "labels", "label_names")
    path = resolve("cifar10", root=tmp_path)
    assert path == tmp_path / "cifar10" / "train.tar"
    manifest = build_manifest(path)
    assert manifest.class_names == ("cat", "dög", "hot dog")
    pixels = np.concatenate([batches["data_batch_1"][0], batches["data_batch_2"][0]])
    assert_holds(manifest, pixels, batches["data_batch_1"][1] + batches["data_batch_2"][1])
    assert_holds(build_manifest(resolve("cifar10:test", root=tmp_path)), *batches["test_batch"])

    written = path.stat().st_mtime_ns
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        file.unlink()
    assert resolve("cifar10:train", root=str(tmp_path)) == path
    assert path.stat().st_mtime_ns == written
    assert sorted(file.name for file in path.parent.iterdir()) == ["classnames.txt", "test.tar", "train.tar"]


def test_cifar100_has_its_fine_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 4, "test": 3}
    batches = write_cifar(monkeypatch, tmp_path, datasets.CIFAR100, sizes, "fine_labels", "fine_label_names")
    manifest = build_manifest(resolve("cifar100:test", root=tmp_path))
    assert manifest.class_names == ("cat", "dög", "hot dog")
    assert_holds(manifest, *batches["test"])


def test_stl10_has_an_unlabeled_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / datasets.STL10.base_folder
    pixels: dict[str, npt.NDArray[np.uint8]] = {}
    tables: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for split, size, table in (
        ("train", 3, "train_list"),
        ("unlabeled", 4, "train_list"),
        ("test", 2, "test_list"),
    ):
        pixels[split] = RNG.integers(0, 256, (size, 96, 96, 3), np.uint8)
        stored = pixels[split].transpose(0, 3, 2, 1)  # channels first, columns before rows
        tables[table].append(write_checked(folder / f"{split}_X.bin", stored.tobytes()))
        if split != "unlabeled":
            numbers = np.arange(1, size + 1, dtype=np.uint8)  # classes count from one
            tables[table].append(write_checked(folder / f"{split}_y.bin", numbers.tobytes()))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    for name, entries in tables.items():
        monkeypatch.setattr(datasets.STL10, name, entries)

    assert_holds(build_manifest(resolve("stl10:test", root=tmp_path)), pixels["test"], [0, 1])
    unlabeled = build_manifest(resolve("stl10:unlabeled", root=tmp_path))
    assert_holds(unlabeled, pixels["unlabeled"], [-1] * 4)
    assert not unlabeled.has_labels
    both = resolve("stl10:train+unlabeled", root=tmp_path)
    assert both == [tmp_path / "stl10" / "train.tar", tmp_path / "stl10" / "unlabeled.tar"]
    manifest = build_manifest(both)
    assert manifest.class_names == ("airplane", "bird", "car")
    assert_holds(manifest, np.concatenate([pixels["train"], pixels["unlabeled"]]), [0, 1, 2] + [-1] * 4)


def test_files_that_are_not_the_known_ones_are_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        write_checked(tmp_path / datasets.CIFAR10.base_folder / name, pickle.dumps(Trap()))
    with pytest.raises(
        DataError, match=r"cannot read cifar10 in .*corrupted.*allow the download.*, or put its files"
    ):
        resolve("cifar10", root=tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_download_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(DataError, match=r"cannot read cifar10 in .*check the connection"):
        resolve("cifar10", root=tmp_path, download=True)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"data_batch_1": 2, "test_batch": 2}
    write_cifar(monkeypatch, tmp_path, datasets.CIFAR10, sizes, "labels", "label_names")

    def fail(self: Any, index: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(datasets.CIFAR10, "__getitem__", fail)
        with pytest.raises(MemoryError):
            resolve("cifar10", root=tmp_path)
    assert [file.name for file in (tmp_path / "cifar10").iterdir()] == ["classnames.txt"]
    assert len(build_manifest(resolve("cifar10", root=tmp_path))) == 2


def test_paths_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "images").mkdir()
    for path in ("images", "./cifar10", "shards/*.tar", tmp_path / "nowhere", Path("cifar10")):
        assert resolve(path, root=tmp_path / "root") == Path(path)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifra10", "'cifra10' is neither a path nor one of the data sets sample, cifar10, cifar100, stl10"),
        ("cifra10:test", "'cifra10:test' is neither a path"),
        ("", "got an empty path, expected one or the name of a data set: sample, cifar10"),
        ("cifar10:unlabeled", r"cifar10 has no split 'unlabeled', expected one or more of train\+test"),
        ("stl10:train+", "stl10 has no split ''"),
    ],
)
def test_names_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve(name, root=tmp_path)


def test_a_root_that_cannot_hold_data_sets(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"cannot keep the data set sample in .*file: (Not a directory|File exists), "
    ):
        resolve("sample", root=tmp_path / "file")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"File name too long|neither a path nor"):
        resolve("x" * 300, root=tmp_path)
