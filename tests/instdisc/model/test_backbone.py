"""Networks by name: unit embeddings, the right stem, refusals that say what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instdisc.common.errors import ConfigError
from instdisc.model.backbone import build_embedder, check_backbone
from instdisc.settings.model import BackboneConfig


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "alexnet", "vgg16_bn", "googlenet", "resnet8", "resnet20", "resnet32"]
)
def test_embeddings_have_unit_length(name: str, size: int) -> None:
    check_backbone(BackboneConfig(name=name, embedding_dim=24), size)
    embedder = build_embedder(BackboneConfig(name=name, embedding_dim=24), size).eval()
    with torch.no_grad():
        embeddings = embedder(torch.randn(2, 3, size, size))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_a_head_of_zeros_is_drawn_anew() -> None:
    embedder = build_embedder(BackboneConfig(name="vit_b_16", embedding_dim=24), 224).eval()
    with torch.no_grad():
        torch.testing.assert_close(embedder(torch.randn(1, 3, 224, 224)).norm(dim=1), torch.ones(1))


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "googlenet"])
def test_small_images_get_a_small_stem(name: str) -> None:
    def stem(size: int) -> tuple[nn.Conv2d, int]:
        modules = list(build_embedder(BackboneConfig(name=name), size).modules())
        convolution = next(module for module in modules if isinstance(module, nn.Conv2d))
        return convolution, sum(isinstance(module, nn.MaxPool2d) for module in modules)

    (small, small_pools), (large, large_pools) = stem(64), stem(65 if name != "alexnet" else 128)
    assert (small.kernel_size, small.stride) == ((3, 3), (1, 1))
    assert large.stride[0] > 1
    assert small_pools == large_pools - 1


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet32", 464_154)])
def test_cifar_resnets_have_the_size_of_the_paper(name: str, parameters: int) -> None:
    """0.27 and 0.46 million with ten classes (He et al. 2016, table 6)."""
    embedder = build_embedder(BackboneConfig(name=name, embedding_dim=10), 32)
    assert sum(parameter.numel() for parameter in embedder.parameters()) == parameters


def test_unknown_network() -> None:
    with pytest.raises(ConfigError, match=r"'resnet19'.*resnet8.*resnet18"):
        check_backbone(BackboneConfig(name="resnet19"), 32)


def test_a_network_without_a_linear_classifier() -> None:
    with pytest.raises(ConfigError, match="squeezenet1_0 does not end in a linear classifier"):
        check_backbone(BackboneConfig(name="squeezenet1_0"), 224)


def test_image_size_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"vit_b_16 cannot take images of 96 pixels.*image-size"):
        check_backbone(BackboneConfig(name="vit_b_16"), 96)


def test_the_stem_that_is_set() -> None:
    def first(stem: str, size: int) -> tuple[int, ...]:
        network = build_embedder(BackboneConfig(name="resnet18", stem=stem), size).modules()
        return next(module for module in network if isinstance(module, nn.Conv2d)).kernel_size

    assert [first(stem, 96) for stem in ("auto", "small", "standard")] == [(7, 7), (3, 3), (7, 7)]
    assert [first(stem, 32) for stem in ("auto", "small", "standard")] == [(3, 3), (3, 3), (7, 7)]
    with pytest.raises(ConfigError, match=r"resnet8 has one stem only: leave --backbone\.stem standard out"):
        check_backbone(BackboneConfig(name="resnet8", stem="standard"), 32)
