"""Weights that do not fit, or are not there, are refused by name before any image is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotWriter
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import build_embedder
from instdisc.settings.model import BackboneConfig
from instdisc.training.weights import starting_weights
from tests.instdisc.program import Run, refused, write_pictures
from tests.instdisc.training.test_weights import IMAGES, configured

RESNET8 = BackboneConfig(name="resnet8", embedding_dim=16)


def state(config: BackboneConfig = RESNET8) -> dict[str, Tensor]:
    return build_embedder(config, 32).backbone.state_dict()


def saved(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


class NotATensor:
    pass


BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "another network": (lambda: {"blocks.0.weight": torch.ones(3)}, ("another network", "--backbone.name")),
    "deeper network": (
        lambda: state(BackboneConfig(name="resnet20", embedding_dim=16)),
        ("layer1.1.conv1.weight", "unknown", "--init.partial"),
    ),
    "another size": (
        lambda: state(BackboneConfig(name="resnet8", embedding_dim=32)),
        ("fc.weight is 32 x 64 there and 16 x 64 here", "--backbone.embedding-dim 32"),
    ),
    "another stem": (
        lambda: state() | {"conv1.weight": torch.ones(16, 3, 7, 7)},
        ("conv1.weight is 16 x 3 x 7 x 7 there and 16 x 3 x 3 x 3 here", "--augmentation.image-size"),
    ),
    "NaN": (
        lambda: state() | {"layer2.0.conv1.weight": torch.full((32, 16, 3, 3), torch.nan)},
        ("layer2.0.conv1.weight holds NaN",),
    ),
    "a layer is missing": (
        lambda: {name: value for name, value in state().items() if "layer3.0.bn1" not in name},
        ("layer3.0.bn1.weight", "missing"),
    ),
    "a pickle": (NotATensor, ("read safely", "state_dict")),
    "nothing": (dict, ("no weights",)),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_do_not_fit_are_refused_before_any_image_is_read(
    case: str, run: Run, tmp_path: Path
) -> None:
    content, texts = BAD[case]
    images = tmp_path / "images"
    images.mkdir()  # which would be refused too
    refused(run(images, "--init.weights", saved(content(), tmp_path / "bad.pth")), *texts)


def test_what_does_not_fit_may_begin_at_random(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", IMAGES)
    given = saved(
        state() | {"conv1.weight": torch.ones(16, 3, 7, 7), "more": torch.ones(1)}, tmp_path / "w.pth"
    )
    status, said, out = run(images, "--init.weights", given, "--init.partial", "--training.epochs", "1")
    assert status == 0, said
    assert "conv1.weight is 16 x 3 x 7 x 7" in said
    assert (out / "init.safetensors").exists()


@pytest.mark.parametrize(
    ("weights", "texts"),
    [
        ("timm:resnet19", ("no network 'resnet19'", "timm:resnet18")),
        ("timm:resnet18.nobody", ("no weights 'resnet18.nobody'", "resnet18.a1_in1k")),
        ("torchvision", ("torchvision has no weights for resnet8", "resnet18")),
        ("nowhere.pth", ("nowhere.pth does not exist",)),
        ("memory://nowhere/weights.pth", ("cannot be read",)),
        ("memory://nowhere", ("no committed snapshot",)),
    ],
)
def test_weights_that_are_not_there_are_refused(
    weights: str, texts: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    refused(run(tmp_path / "images", "--init.weights", weights), *texts)


def test_weights_of_other_networks_of_torchvision_and_timm_are_refused() -> None:
    for backbone, weights, text in (
        ("resnet18", "ResNet50_Weights.DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"),
        ("timm:test_resnet", "timm:test_vit", "leave --backbone.name out"),
    ):
        config = configured("--backbone.name", backbone, "--init.weights", weights)
        with pytest.raises(ConfigError, match=text):
            starting_weights(config)


def test_a_snapshot_without_a_network_is_refused(run: Run, tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "snapshots", Partition(1, 1), 0, "test")
    writer.save(1, {"embeddings": torch.ones(1, 16)}, {}, {})
    writer.close()
    (tmp_path / "images").mkdir()
    refused(run(tmp_path / "images", "--init.weights", "snapshots"), "holds no network")


def test_timm_that_is_missing_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "images").mkdir()
    for options in (["--backbone.name", "timm:resnet18"], ["--init.weights", "timm:resnet18"]):
        refused(run(tmp_path / "images", *options), "pip install 'instdisc[timm]'")
