"""The objectives, one file each, and the table that finds them by the type of their settings."""

from __future__ import annotations

from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective, Result
from instdisc.objectives.infonce import InfoNCE
from instdisc.objectives.nce import NCE
from instdisc.objectives.parametric import ParametricSoftmax
from instdisc.objectives.softmax import Softmax
from instdisc.objectives.spreading import Spreading
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)

OBJECTIVES: dict[type[ObjectiveConfig], type[Objective]] = {
    NCEConfig: NCE,
    SoftmaxConfig: Softmax,
    InfoNCEConfig: InfoNCE,
    ParametricSoftmaxConfig: ParametricSoftmax,
    SpreadingConfig: Spreading,
}

__all__ = [
    "NCE",
    "OBJECTIVES",
    "BatchQueries",
    "InfoNCE",
    "InfoNCEConfig",
    "MergeLogSums",
    "NCEConfig",
    "Objective",
    "ObjectiveConfig",
    "ParametricSoftmax",
    "ParametricSoftmaxConfig",
    "Result",
    "Softmax",
    "SoftmaxConfig",
    "Spreading",
    "SpreadingConfig",
]
