"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cluster.ranges import Amount, Range, Ranged


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Ranged):
    """SGD with momentum; the defaults are those of Wu et al. 2018."""

    learning_rate: Annotated[float, Range(above=0, usual="0.03")] = 0.03
    """The highest rate, reached after the warm-up; above 0."""
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")] = 0.9
    """Momentum, from 0 to below 1."""
    weight_decay: Amount = 1e-4
    """Weight decay, 0 or above."""
    schedule: Literal["steps", "cosine"] = "steps"
    """After the warm-up: times `decay` at each milestone, or a half cosine to 0 at the end."""
    milestones: tuple[float, ...] = (120, 160)
    """Epochs at which the rate drops, for `steps`."""
    decay: Annotated[float, Range(at_least=0, at_most=1, usual="0.1")] = 0.1
    """Factor by which the rate drops at each milestone."""
    warmup_epochs: Amount = 0.0
    """Length of the linear warm-up, in epochs."""
    backbone_rate_scale: Annotated[float, Range(above=0, usual="1, or 0.1 with given weights,")] = 1.0
    """Factor of the rate for all layers but the head; below 1 to keep more of given weights. Above 0."""
    frozen_epochs: Amount = 0.0
    """Epochs at the start in which the head alone is trained; the other layers' batch statistics follow the images."""
