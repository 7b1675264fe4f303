"""The demo as `make demo` runs it: two workers under Ray learn from the bundled images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instdisc.runs.run_directory import RunDirectory
from tests.ray_cluster import CHECKOUT


def test_make_demo_runs_the_sample_recipe() -> None:
    dry_run = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert "-m instdisc.train sample" in dry_run.stdout


@pytest.mark.ray
def test_the_demo_learns_more_than_the_pixels_tell(tmp_path: Path) -> None:
    program = subprocess.run(
        [
            sys.executable,
            "-m",
            "instdisc.train",
            "sample",
            "--training.epochs",
            "5",
            "--run-dir",
            "runs/demo",
        ],
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
    assert summary["knn_top1"] >= 0.36  # after a ninth of the demo's epochs
    assert summary["knn_top1"] > summary["knn_top1_untrained"]
    bank = RunDirectory(run).open_snapshot().read("embeddings")
    assert bank.shape == (5000, 128)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-5)
    for text in ("raw pixels", "untrained network", "runs/demo", "next:", "epoch 5: kNN top-1"):
        assert text in said
    assert "Traceback" not in said
    evaluate_with_two_actors(tmp_path, summary)


def evaluate_with_two_actors(folder: Path, summary: dict[str, Any]) -> None:
    """Every protocol on the demo's run, cut down to what takes a minute."""
    small = ["--linear.max-images", "1000", "--linear.max-dims", "128", "--linear.iterations", "20"]
    small += ["--finetune.fractions", "0.1", "--finetune.epochs", "1", "--finetune.min-steps", "60"]
    small += [
        "--unseen.classes",
        "second-half",
        "--unseen.clusterings",
        "2",
        "--statistics.max-images",
        "500",
    ]
    small += ["--protocols", "knn,linear,finetune,unseen,statistics,page"]
    where = ["runs/demo", "--num-actors", "2", "--output", "numbers"]
    program = subprocess.run(
        [sys.executable, "-m", "instdisc.evaluate", *where, *small],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert program.returncode == 0, program.stdout + program.stderr
    assert not [line for line in program.stderr.splitlines() if line.startswith(("[", "(", "20"))]  # of Ray
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "numbers").glob("*.json")}
    assert sorted(found) == ["finetune", "knn", "linear", "page", "statistics", "unseen"]
    # Training may embed the test images in bfloat16, the evaluation does in float32.
    assert found["knn"]["accuracies"]["k200"]["top1"] == pytest.approx(summary["knn_top1_bank"], abs=0.01)
    stages = found["linear"]["stages"]
    assert stages["features"]["probe"]["top1"] > 0.3
    assert found["finetune"]["fractions"][0]["trained"]["top1"] > 0.3
    recall = found["unseen"]["recall"]
    assert 0.2 < recall["1"] < recall["2"] < recall["8"] < recall["100"] <= 1
    assert 0 < found["unseen"]["nmi"] < 1
    assert found["statistics"]["alignment"] > 0
    assert (folder / "numbers" / "index.html").stat().st_size > 100_000
