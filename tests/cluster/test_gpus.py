"""Who may compute on a GPU, and what is said where none can be used. No GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster import gpus
from cluster.actors import share_out
from cluster.errors import ClusterError
from cluster.gpus import check_driver, driver_version, may_use_gpu
from cluster.launch import launch
from cluster.settings import ActorsConfig, LaunchConfig
from tests.ray_cluster import RayCluster

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc 13.2.0\n"
OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"


@pytest.mark.parametrize(("text", "version"), [(OPEN, "580.65.06"), (OLD, "535.129.03"), ("", None)])
def test_the_driver_tells_its_version(tmp_path: Path, text: str, version: str | None) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(text)
    assert driver_version(file) == version


def test_a_driver_too_old_for_pytorch_is_refused_with_both_versions() -> None:
    with pytest.raises(
        ClusterError, match=r"driver of this node is 535\.129\.03, .*CUDA 13\.2 needs 580 or newer"
    ):
        check_driver("535.129.03", "13.2")
    for found, cuda in (("580.65.06", "13.2"), ("535.129.03", "12.8"), (None, "13.2"), ("535.129.03", None)):
        check_driver(found, cuda)


def test_pytorch_of_this_project_has_a_known_oldest_driver() -> None:
    assert torch.version.cuda is not None
    with pytest.raises(ClusterError, match="or newer"):
        check_driver("400.1", torch.version.cuda)


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose GPUs PyTorch does not see for its driver's age."""
    monkeypatch.setattr(gpus, "driver_version", lambda: "535.129.03")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("old_driver")
@pytest.mark.parametrize("asked", [None, 1])
def test_training_does_not_fall_back_to_the_cpu_unasked(tmp_path: Path, asked: int | None) -> None:
    config = LaunchConfig(num_workers=0, gpus_per_worker=asked)
    with pytest.raises(ClusterError, match=r"is 535\.129\.03, but PyTorch .* update the driver"):
        launch(device_of, None, config, name="test", storage=tmp_path)
    on_cpu = LaunchConfig(num_workers=0, gpus_per_worker=0)
    assert launch(device_of, None, on_cpu, name="test", storage=tmp_path) == "cpu"


def test_a_gpu_that_is_asked_for_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "driver_version", lambda: None)
    with pytest.raises(ClusterError, match=r"was given a GPU, but PyTorch sees none .*driver: none"):
        launch(device_of, None, LaunchConfig(num_workers=0, gpus_per_worker=1), name="test", storage=tmp_path)


def device_of(worker: object, payload: None) -> str:
    return str(worker.device)  # type: ignore[attr-defined]


def on_a_node_with_gpus(_: None, __: None) -> bool:
    """What a process of Ray's that reserved no GPU makes of those that it sees."""
    torch.cuda.is_available = lambda: True
    return may_use_gpu()


def test_processes_that_reserved_no_gpu_use_none(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert may_use_gpu()  # here, where nothing is reserved at all
    config = ActorsConfig(num_actors=1, gpus_per_actor=0)
    assert list(share_out(on_a_node_with_gpus, None, [None], config)) == [False]


@pytest.mark.parametrize(
    ("visible", "ordered"),
    [("0,1,10,11,2", "0,1,2,10,11"), ("3", "3"), ("GPU-b,GPU-a", "GPU-b,GPU-a"), ("", "")],
)
def test_gpus_are_numbered_as_their_ids_are(
    monkeypatch: pytest.MonkeyPatch, visible: str, ordered: str
) -> None:
    """Ray sorts them as text and ranks by number; NCCL takes the one whose index is the local rank."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus.order_visible_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ordered
