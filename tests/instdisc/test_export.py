"""Exported networks, used as the printed lines say, compute what the run's network computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotWriter
from instdisc.export import main
from instdisc.model.backbone import Embedder, build_embedder
from instdisc.runs.network import NETWORK
from instdisc.settings.model import BackboneConfig
from instdisc.settings.recipes import RECIPES
from instdisc.settings.schema import to_json
from tests.processes import files_of_at_most


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """A run directory as training leaves it, as far as export reads it; weights as they are before training."""

    def trained(name: str, image_size: int) -> tuple[Path, Embedder]:
        torch.manual_seed(0)
        config = BackboneConfig(name=name, embedding_dim=16)
        network = build_embedder(config, image_size).eval()
        writer = SnapshotWriter(tmp_path / "snapshots", Partition(1, 1), 0, "test")
        files = {NETWORK: save(network.backbone.state_dict())}
        augmentation = {"image_size": image_size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
        noted = {"backbone": dataclasses.asdict(config), "augmentation": augmentation}
        writer.save(1, {"embeddings": torch.ones(1, 16)}, files, {"settings": noted})
        writer.close()
        assert [report.error for report in writer.poll()] == [None]
        settings = to_json(RECIPES["sample"].config, "sample", "test") | noted
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return tmp_path, network

    return trained


def printed_network(printed: str) -> Any:
    """Run the lines below the path that export prints."""
    names: dict[str, Any] = {}
    exec(printed.partition("\n\n")[2], names)
    return names["network"].eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), [("resnet18", 32), ("resnet18", 96), ("alexnet", 64)])
def test_torchvision(trained: Any, capsys: pytest.CaptureFixture[str], name: str, image_size: int) -> None:
    run, network = trained(name, image_size)
    assert main([str(run), "--format", "torchvision"]) == 0
    printed = capsys.readouterr().out
    assert ("stem" in printed) == (image_size <= 64)
    loaded = printed_network(printed)
    images = torch.randn(3, 3, image_size, image_size)
    head = list(network.backbone.modules())[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(head(loaded(images)), dim=1), network(images))


def test_torchvision_has_no_cifar_resnet(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained("resnet8", 32)
    assert main([str(run), "--format", "torchvision"]) == 2
    assert "error: resnet8 is not a torchvision network" in capsys.readouterr().err
    assert not list((run / "export").iterdir())


def test_safetensors(trained: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, network = trained("resnet8", 32)
    file = tmp_path / "elsewhere" / "network.safetensors"
    assert main([str(run), "--format", "safetensors", "--output", str(file)]) == 0
    loaded = printed_network(capsys.readouterr().out)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    with safe_open(file, "pt") as opened:
        facts = {name: json.loads(value) for name, value in opened.metadata().items()}
    assert facts == {
        "backbone": "resnet8",
        "embedding_dim": 16,
        "stem": "auto",
        "image_size": 32,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), [("resnet8", 32), ("resnet18", 96)])
def test_onnx(trained: Any, name: str, image_size: int) -> None:
    run, network = trained(name, image_size)
    assert main([str(run), "--format", "onnx"]) == 0
    file = run / "export" / f"{name}.onnx"
    onnx.checker.check_model(file, full_check=True)
    assert {entry.key for entry in onnx.load(file).metadata_props} >= {"mean", "std", "image_size"}
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, image_size, image_size)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, network(images).numpy(), atol=1e-4)


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--format", "onnx"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(("name", "format"), [("resnet8", "safetensors"), ("alexnet", "torchvision")])
def test_a_full_disk_is_an_error_that_names_the_file(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, format: str
) -> None:
    run, _ = trained(name, 64)
    file = tmp_path / "out" / "network"
    with files_of_at_most(1000):
        assert main([str(run), "--format", format, "--output", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno")
    assert str(file) in said
    assert list(file.parent.iterdir()) == []
