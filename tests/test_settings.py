"""Settings that no value makes sense of are refused where they are given, by name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.settings import ActorsConfig
from instdisc.settings.evaluation import (
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    PageConfig,
    StatisticsConfig,
    UnseenConfig,
)
from instdisc.settings.model import BackboneConfig
from instdisc.settings.run import KnnMonitorConfig, SnapshotConfig


@pytest.mark.parametrize(
    ("config", "name", "values"),
    [
        (ActorsConfig, "num_actors", [-1]),
        (ActorsConfig, "cpus_per_actor", [0.0, -1.0]),
        (ActorsConfig, "gpus_per_actor", [-1, 2]),
        (BackboneConfig, "embedding_dim", [0, 1]),
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
        with pytest.raises(ValueError, match=name):
            config(**{name: value})
