"""Jobs on three nodes of one machine, and what becomes of them when one is lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.counting import ray_node
from tests.debian import need
from tests.e2e.three_nodes import (
    Place,
    evaluate,
    has_snapshot,
    namespaces,
    namespaces_permitted,
    three_nodes,
    train,
)
from tests.ray_cluster import wait_until

pytestmark = pytest.mark.ray

SHORT = ["--training.epochs", "1", "--snapshots.every-steps", "4", "--knn.no-baselines"]
LOOPBACK = [Place(f"127.0.0.{number}") for number in (1, 2, 3)]


def wait_for_snapshot(run: Path, program: subprocess.Popen[str]) -> None:
    wait_until(lambda: program.poll() is not None or has_snapshot(run), timeout_s=300)
    assert program.poll() is None, program.communicate()[0]


def ended_on_one_node(run: Path, program: subprocess.Popen[str]) -> dict[str, Any]:
    """The summary of a run that lost a node."""
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 0, said
    assert "restart 1 of 3" in said
    assert "starting 1 worker of 1 CPU each (STRICT_SPREAD)" in said
    assert "resuming from the snapshot of step" in said
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (39, 1)
    return summary


def test_training_loses_a_node_and_the_evaluation_has_a_new_one(tmp_path: Path) -> None:
    with three_nodes(LOOPBACK) as (cluster, nodes):
        program = train(cluster, tmp_path / "run", SHORT)
        wait_for_snapshot(tmp_path / "run", program)
        nodes[-1].kill()
        summary = ended_on_one_node(tmp_path / "run", program)
        with ray_node(cluster, "127.0.0.4"):
            accuracies = evaluate(cluster, tmp_path / "run")
    # Training may embed the test images in bfloat16, the evaluation does in float32.
    assert accuracies["top1"] == pytest.approx(summary["knn_top1_bank"], abs=0.01)


def test_a_link_is_cut(tmp_path: Path) -> None:
    need("ip", package="iproute2")
    if not namespaces_permitted():
        pytest.skip("needs root and network namespaces")
    with namespaces(3) as places, three_nodes(places) as (cluster, _):
        program = train(cluster, tmp_path / "run", [*SHORT, "--collective-timeout-s", "10"])
        wait_for_snapshot(tmp_path / "run", program)
        places[-1].cut()
        ended_on_one_node(tmp_path / "run", program)
