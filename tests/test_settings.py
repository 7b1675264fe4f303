"""Settings that no value makes sense of are refused where they are given, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.ranges import Range
from cluster.settings import ActorsConfig, LaunchConfig, MetricsConfig
from instdisc.settings.evaluation import (
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    PageConfig,
    StatisticsConfig,
    UnseenConfig,
)
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import NCEConfig, ObjectiveConfig, ParametricSoftmaxConfig
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.settings.run import KnnMonitorConfig, SnapshotConfig, TrainingConfig
from pipelines.augment import Augmentation
from pipelines.settings import LoaderConfig


@pytest.mark.parametrize(
    ("config", "name", "values"),
    [
        (ActorsConfig, "num_actors", [-1]),
        (ActorsConfig, "cpus_per_actor", [0.0, -1.0]),
        (ActorsConfig, "gpus_per_actor", [-1, 2]),
        (LaunchConfig, "num_workers", [-1]),
        (LaunchConfig, "min_workers", [0]),
        (LaunchConfig, "cpus_per_worker", [0.0, math.nan]),
        (LaunchConfig, "gpus_per_worker", [-1, 2]),
        (LaunchConfig, "wait_s", [0.0]),
        (LaunchConfig, "collective_timeout_s", [0]),
        (LaunchConfig, "max_restarts", [-1]),
        (LaunchConfig, "stop_grace_s", [-1.0]),
        (MetricsConfig, "port", [80, 65_001]),
        (BackboneConfig, "embedding_dim", [0, 1]),
        (BankConfig, "momentum", [-0.1, 1.0]),
        (OptimizerConfig, "learning_rate", [0.0, math.inf, math.nan]),
        (OptimizerConfig, "decay", [1.5]),
        (OptimizerConfig, "backbone_rate_scale", [0.0, math.inf]),
        (OptimizerConfig, "frozen_epochs", [-1.0, math.inf]),
        (ParametricSoftmaxConfig, "temperature", [0.001]),
        (ParametricSoftmaxConfig, "momentum", [1.0]),
        (NCEConfig, "num_negatives", [0]),
        (NCEConfig, "proximal_weight", [-1.0, math.inf]),
        (TrainingConfig, "epochs", [0]),
        (LoaderConfig, "threads", [0]),
        (LoaderConfig, "prefetch", [0]),
        (LoaderConfig, "backend", ["dally"]),
        (Augmentation, "image_size", [0]),
        (Augmentation, "brightness", [-1.0, math.inf]),
        (Augmentation, "hue", [0.6]),
        (Augmentation, "flip_probability", [1.5]),
        (Augmentation, "crop_scale", [(0.0, 1.0), (0.5, 0.2)]),
        (Augmentation, "crop_ratio", [(0.0, 1.0)]),
        (Augmentation, "mean", [(0.0, math.nan, 0.0)]),
        (Augmentation, "std", [(0.0, 1.0, 1.0)]),
        (KnnMonitorConfig, "every", [-1]),
        (KnnMonitorConfig, "k", [0]),
        (KnnMonitorConfig, "temperature", [0.0, float("nan")]),
        (SnapshotConfig, "every_steps", [0]),
        (SnapshotConfig, "keep", [0]),
        (KnnConfig, "k", [0]),
        (KnnConfig, "temperature", [0.0, -1.0]),
        (LinearConfig, "regularizations", [(), (1.0, 0.0)]),
        (LinearConfig, "held_out", [0.0, 1.0]),
        (LinearConfig, "max_dims", [0]),
        (LinearConfig, "max_images", [0]),
        (LinearConfig, "iterations", [0]),
        (FinetuneConfig, "fractions", [(), (0.5, 1.5), (0.0,)]),
        (FinetuneConfig, "min_steps", [0]),
        (UnseenConfig, "ranks", [(), (0, 1)]),
        (UnseenConfig, "clusterings", [0]),
        (StatisticsConfig, "max_images", [1]),
        (StatisticsConfig, "bins", [1]),
        (PageConfig, "examples", [0]),
        (PageConfig, "neighbors", [0]),
        (PageConfig, "thumbnail", [0]),
        (PageConfig, "temperature", [0.0]),
    ],
)
def test_values_out_of_range_are_refused_by_name(config: type[Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match="expected") as refused:
            config(**{name: value})
        assert str(refused.value).startswith(f"{name} is {value!r}, expected ")


def test_the_message_names_the_range_and_what_is_usual() -> None:
    with pytest.raises(ValueError, match=r"^momentum is 1\.5, expected at least 0 and below 1; usual: 0\.5$"):
        BankConfig(momentum=1.5)
    with pytest.raises(
        ValueError, match=r"^learning_rate is inf, expected finite and above 0; usual: 0\.03$"
    ):
        OptimizerConfig(learning_rate=math.inf)
    with pytest.raises(ValueError, match=r"^ranks is \(\), expected one or more, each at least 1$"):
        UnseenConfig(ranks=())


def test_a_subclass_with_another_default_keeps_the_range() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(ObjectiveConfig):
        temperature: float = 0.1

    assert Mine().temperature == 0.1
    with pytest.raises(
        ValueError, match=r"^temperature is 0\.0, expected at least 0\.005; usual: 0\.07 to 0\.2$"
    ):
        Mine(temperature=0.0)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(at_least=0), [0, 1e9], [-1e-9, math.inf, math.nan]),
        (Range(at_least=1), [1, 2**63 - 1], [0, 2**63, 10**400]),
        (Range(above=0, at_most=1), [1e-9, 1], [0, 1 + 1e-9]),
        (Range(at_least=0, below=1), [0, 0.5], [1, -math.inf]),
    ],
)
def test_what_a_range_holds(allowed: Range, inside: list[float], outside: list[float]) -> None:
    assert all(map(allowed.holds, inside))
    assert not any(map(allowed.holds, outside))
