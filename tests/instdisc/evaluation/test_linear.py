"""Linear classifiers against scikit-learn's, and the features they get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn import functional as F

from instdisc.common.errors import ConfigError
from instdisc.evaluation.linear import (
    CLASSIFIERS,
    Split,
    cross_entropy,
    fit_linear,
    linear_accuracy,
    squared_hinge,
    top_k_accuracy,
)
from instdisc.model.backbone import build_embedder
from instdisc.model.features import mirrored_features, pooled, stage_features, stage_names
from instdisc.settings.evaluation import LinearConfig
from instdisc.settings.model import BackboneConfig


def clouds(count: int, spread: float, classes: int = 4, seed: int = 0) -> Split:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = np.random.default_rng(99).standard_normal((classes, 12))
    features = centers[labels] + spread * generator.standard_normal((count, 12))
    return Split(torch.tensor(features, dtype=torch.float32), torch.tensor(labels))


@pytest.mark.parametrize("regularization", [0.1, 0.01])
def test_the_optimum_is_that_of_scikit_learn(regularization: float) -> None:
    features, labels = clouds(300, 1.5)
    strength = 1 / (regularization * 300)
    peers = {
        cross_entropy: LogisticRegression(C=strength, max_iter=1000, tol=1e-8),
        squared_hinge: LinearSVC(C=strength, dual=False, tol=1e-8, intercept_scaling=1e3, max_iter=10_000),
    }
    for loss, peer in peers.items():
        peer.fit(features.numpy(), labels.numpy())
        found = fit_linear(features, labels, 4, loss=loss, regularization=regularization, iterations=500)
        np.testing.assert_allclose(found[:, :-1].numpy(), peer.coef_, atol=3e-3)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_separable_classes_are_separated(name: str) -> None:
    train, test = clouds(200, 0.05), clouds(100, 0.05, seed=1)
    train.labels[::10] = -1
    result = linear_accuracy(train, test, 4, loss=CLASSIFIERS[name], config=LinearConfig())
    assert (result.top1, result.top5, result.held_out_top1) == (1, 1, 1)


def test_a_class_without_training_images_counts_as_wrong() -> None:
    train, test = clouds(200, 0.05), clouds(100, 0.05, seed=1)
    test.labels[:25] = 7
    result = linear_accuracy(train, test, 4, loss=cross_entropy, config=LinearConfig())
    assert result.top1 == 0.75


def test_too_few_labels() -> None:
    train, test = clouds(200, 0.05), clouds(100, 0.05)
    with pytest.raises(ConfigError, match="two classes"):
        linear_accuracy(
            Split(train.features, train.labels.clamp(max=0)),
            test,
            4,
            loss=cross_entropy,
            config=LinearConfig(),
        )


def test_top_k() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.3], [0.1, 0.2, 0.3]])
    labels = torch.tensor([2, 0, 5])
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet8", ["conv1", "layer1", "layer2", "layer3", "features", "embeddings"]),
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4", "features", "embeddings"]),
        ("alexnet", ["conv1", "conv2", "conv3", "conv4", "conv5", "features", "embeddings"]),
        ("vgg11_bn", ["conv1", "conv2", "conv3", "conv4", "conv5", "features", "embeddings"]),
        ("mobilenet_v3_small", ["features", "embeddings"]),
    ],
)
def test_stages_of_networks(backbone: str, expected: list[str]) -> None:
    network = build_embedder(BackboneConfig(name=backbone, embedding_dim=16), 64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert list(stage_names(network.backbone)) == expected
    for stage in expected:
        features = stage_features(network, images, stage=stage, max_dims=700)
        assert features.shape[0] == 2
        assert features.shape[1] <= 700 or stage == "features" or features.shape[1] == 512
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_features_of_a_stage_are_what_the_network_computes() -> None:
    network = build_embedder(BackboneConfig(name="resnet8", embedding_dim=16), 32).eval()
    backbone, images = network.backbone, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first = F.relu(backbone.bn1(backbone.conv1(images)))
        second = backbone.layer2(backbone.layer1(first))
        expected = {
            "conv1": nn.AdaptiveAvgPool2d(4)(first).flatten(1),
            "layer2": nn.AdaptiveAvgPool2d(2)(second).flatten(1),
            "features": backbone.layer3(second).mean(dim=(2, 3)),
            "embeddings": network(images),
        }
    for stage, features in expected.items():
        torch.testing.assert_close(stage_features(network, images, stage=stage, max_dims=256), features)


def test_pooling_keeps_within_the_bound() -> None:
    assert pooled(torch.zeros(2, 16, 24, 24), 9216).shape == (2, 9216)
    assert pooled(torch.zeros(2, 16, 25, 25), 9216).shape == (2, 9216)
    assert pooled(torch.zeros(2, 2048, 7, 7), 1000).shape == (2, 2048)
    assert pooled(torch.zeros(2, 70), 64).shape == (2, 70)


@pytest.mark.parametrize(("name", "dims"), [("resnet8", 256), ("resnet18", 512), ("alexnet", 256)])
def test_features_of_the_last_stage_are_those_of_image_and_mirror_image(name: str, dims: int) -> None:
    torch.manual_seed(0)
    network = build_embedder(BackboneConfig(name=name, embedding_dim=16), 64).eval()
    images = torch.randn(3, 3, 64, 64)
    found = mirrored_features(network, images)
    torch.testing.assert_close(found, mirrored_features(network, images.flip(3)))
    stage = {"resnet8": "layer3", "resnet18": "layer4", "alexnet": "conv5"}[name]
    of_both = [stage_features(network, each, stage=stage, max_dims=512) for each in (images, images.flip(3))]
    expected = sum(each.double() / each.double().norm(dim=1, keepdim=True) for each in of_both)
    assert found.shape == (3, dims)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
