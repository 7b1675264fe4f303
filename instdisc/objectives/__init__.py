"""The objectives, one file each, and the table that finds them by the type of their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from instdisc.objectives.base import MergeLogSums, Objective, Result
from instdisc.objectives.nce import NCE, NCEConfig
from instdisc.objectives.softmax import Softmax, SoftmaxConfig

ObjectiveConfig = NCEConfig | SoftmaxConfig

OBJECTIVES: dict[type[ObjectiveConfig], Callable[[Any, int, int], Objective]] = {
    NCEConfig: NCE,
    SoftmaxConfig: Softmax,
}

__all__ = [
    "NCE",
    "OBJECTIVES",
    "MergeLogSums",
    "NCEConfig",
    "Objective",
    "ObjectiveConfig",
    "Result",
    "Softmax",
    "SoftmaxConfig",
]
