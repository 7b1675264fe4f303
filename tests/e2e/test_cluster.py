"""Training on a cluster that runs already: by a job, and what a user sees when something is wrong on a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instdisc.runs.run_directory import RunDirectory
from tests.ray_cluster import CHECKOUT, RayCluster, processes_of_this_block, wait_until

SHORT = ["--training.epochs", "1", "--data.fraction", "0.4", "--data.root", "DATA"]


def short(tmp_path: Path, *more: str) -> list[str]:
    arguments = [argument.replace("DATA", str(tmp_path / "data")) for argument in SHORT]
    return ["-m", "instdisc.train", "sample", *arguments, "--run-dir", str(tmp_path / "run"), *more]


def test_a_submitted_job_trains_on_the_cluster(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = ray_cluster.submit("python", *short(tmp_path), timeout_s=300)
    assert job.returncode == 0, job.stdout
    assert "run directory" in job.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 15)
    assert RunDirectory(tmp_path / "run").open_snapshot().tables["embeddings"] == ((2000, 128), "float32")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        pytest.param(["--training.batch-size", "127"], ["batch of 127", "multiple of 2"], id="batch"),
        pytest.param(
            ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-epochs", "0", "--knn.no-baselines"],
            ["step 1", "not finite on rank", "the state before this step"],
            id="not finite",
        ),
    ],
)
def test_errors_of_workers_reach_the_user(
    ray_cluster: RayCluster, tmp_path: Path, options: list[str], texts: list[str]
) -> None:
    program = subprocess.run(
        [sys.executable, *short(tmp_path, *options)],
        cwd=CHECKOUT,
        env=os.environ | ray_cluster.environment | {"RAY_ADDRESS": ray_cluster.address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert program.returncode == 2, program.stderr
    assert "Traceback" not in program.stderr
    for text in texts:
        assert text in program.stderr


@pytest.mark.ray
def test_a_lost_worker_is_replaced_and_training_goes_on(tmp_path: Path) -> None:
    environment: dict[str, str] = {"RAY_ADDRESS": "local"}
    restarting = ["--max-restarts", "1", "--training.epochs", "2", "--snapshots.every-steps", "5"]
    restarting += ["--knn.no-baselines"]
    with processes_of_this_block(environment) as alive:
        program = subprocess.Popen(
            [sys.executable, *short(tmp_path, *restarting)],
            cwd=CHECKOUT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"step": 10,' in metrics.read_text(), timeout_s=200)
        workers = [
            pid for pid in alive() if b"ray::RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        said, _ = program.communicate(timeout=300)
    assert program.returncode == 0, said
    assert "restart 1 of 1" in said
    assert "resuming from the snapshot of step" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 30
