"""The objectives, one file each, and the table that finds them by the type of their settings."""

from __future__ import annotations

from instdisc.objectives.base import MergeLogSums, Objective, Queries, Result
from instdisc.objectives.infonce import InfoNCE, InfoNCEConfig
from instdisc.objectives.nce import NCE, NCEConfig
from instdisc.objectives.parametric import ParametricSoftmax, ParametricSoftmaxConfig
from instdisc.objectives.softmax import Softmax, SoftmaxConfig
from instdisc.objectives.spreading import Spreading, SpreadingConfig

ObjectiveConfig = NCEConfig | SoftmaxConfig | InfoNCEConfig | ParametricSoftmaxConfig | SpreadingConfig

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
    "InfoNCE",
    "InfoNCEConfig",
    "MergeLogSums",
    "NCEConfig",
    "Objective",
    "ObjectiveConfig",
    "ParametricSoftmax",
    "ParametricSoftmaxConfig",
    "Queries",
    "Result",
    "Softmax",
    "SoftmaxConfig",
    "Spreading",
    "SpreadingConfig",
]
