"""The demo as `make demo` runs it: two workers under Ray learn from the bundled images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from instdisc.run_directory import RunDirectory
from tests.ray_cluster import CHECKOUT


def test_make_demo_runs_the_sample_recipe() -> None:
    dry_run = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert "-m instdisc.train sample" in dry_run.stdout


def test_the_demo_learns_more_than_the_pixels_tell(tmp_path: Path) -> None:
    program = subprocess.run(
        [sys.executable, "-m", "instdisc.train", "sample", "--run-dir", "runs/demo"],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = program.stdout + program.stderr
    assert program.returncode == 0, said
    run = tmp_path / "runs" / "demo"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["num_instances"]) == (2, 5000)
    assert 0.32 < summary["knn_top1_raw_pixels"] < 0.38
    assert summary["knn_top1"] >= 0.50
    assert summary["knn_top1"] > summary["knn_top1_untrained"]
    bank = RunDirectory(run).open_snapshot().read("embeddings")
    assert bank.shape == (5000, 128)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-5)
    for text in ("raw pixels", "untrained network", "runs/demo", "next:", "epoch 20: kNN top-1"):
        assert text in said
    assert "Traceback" not in said
