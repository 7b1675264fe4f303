import gzip
import runpy
from pathlib import Path

import numpy as np
import pytest

from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.verify import verify

DATA = Path(__file__).resolve().parents[2] / "data"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("test", 1000)])
def test_is_balanced_and_sound(tmp_path: Path, split: str, count: int) -> None:
    manifest = build_manifest(resolve(f"sample:{split}", root=tmp_path), show_progress=False)
    assert manifest.class_names == CLASSES
    assert np.bincount(manifest.labels).tolist() == [count // 10] * 10
    assert (manifest.heights == 32).all()
    assert (manifest.widths == 32).all()
    # Folders of the keys are the original's classes.
    assert all(
        key.startswith(CLASSES[label]) for key, label in zip(manifest.keys, manifest.labels, strict=True)
    )
    assert verify(manifest, show_progress=False) is manifest


def test_is_small_enough_to_be_in_a_repository() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("sample-*.tar.gz")) <= 14_000_000


@pytest.mark.slow
def test_can_be_made_again(shared_data: Path, tmp_path: Path) -> None:
    make_sample = runpy.run_path(str(DATA / "make_sample.py"))["make_sample"]
    make_sample(shared_data / "cifar10-png.tar", 0, tmp_path)
    for split in ("train", "test"):
        name = f"sample-{split}.tar.gz"
        # Unpacked: builds of zlib differ in how they compress the same bytes.
        with gzip.open(tmp_path / name) as again, gzip.open(DATA / name) as bundled:
            assert again.read() == bundled.read()
    assert (tmp_path / "classnames.txt").read_text() == (DATA / "classnames.txt").read_text()
