"""The program that shows what a GPU can do, dry, and where hardly anything is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines.build import build_manifest
from pipelines.datasets import resolve

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["right", "views", "waits", "objectives", "steps", "images", "knn", "cifar10"]
# All but torch and what it needs, torchvision, numpy, Pillow and pyarrow. What is None in `sys.modules` raises.
WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None
from benchmarks.{program} import main
sys.exit(main(sys.argv[1:]))
"""
NAMES = [
    *("ray", "tyro", "zarr", "faiss", "nvidia.dali", "prometheus_client", "psutil", "tqdm", "safetensors"),
    *("timm", "sklearn", "scipy"),
]


def run(program: str, *arguments: object) -> str:
    code = WITHOUT.format(names=NAMES, program=program)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample as a folder of small pieces."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        whole = resolve(f"sample:{split}", root=folder / "whole")
        run("cut", whole, folder / "cut" / split, "--megabytes", 1.5 if split == "train" else 55)
    return folder / "cut"


def test_a_data_set_is_cut_into_pieces_that_are_the_same(cut: Path) -> None:
    pieces = sorted((cut / "train").glob("*.tar"))
    assert len(pieces) > 2
    assert all(piece.stat().st_size <= 1.5e6 for piece in pieces)
    members = [member.name for piece in pieces for member in tarfile.open(piece)]  # noqa: SIM115
    with tarfile.open(cut.parent / "whole/sample/train.tar") as whole:
        assert members == [member.name for member in whole]
    assert len(build_manifest(cut / "train", show_progress=False)) == 5000


def test_every_part_runs_dry_with_hardly_anything_installed(cut: Path, tmp_path: Path) -> None:
    options = [
        "--device",
        "cpu",
        "--small",
        "--minutes",
        0.01,
        "--data",
        cut,
        "--json",
        tmp_path / "rows.json",
    ]
    said = run("gpu", *options)
    results = json.loads((tmp_path / "rows.json").read_text())
    assert list(results) == ["machine", "needs_two_gpus", *PARTS]
    for part in PARTS:
        assert f"\n{part}\n" in said
        assert results[part]
        assert not [row for row in results[part] if row.get("ok") is False]
    (trained,) = results["cifar10"]
    assert trained["epochs"] == 1
    assert 0 <= trained["knn_top1"] <= 1


def test_a_part_is_chosen_by_name(tmp_path: Path) -> None:
    said = run("gpu", "knn", "--device", "cpu", "--small", "--json", tmp_path / "rows.json")
    assert "similarities of both" in said
    assert set(json.loads((tmp_path / "rows.json").read_text())) == {"machine", "needs_two_gpus", "knn"}
