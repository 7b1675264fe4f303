"""Settings of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum; the defaults are those of Wu et al. 2018."""

    learning_rate: float = 0.03
    """The highest rate, reached after the warm-up; above 0."""
    momentum: float = 0.9
    """From 0 to below 1."""
    weight_decay: float = 1e-4
    """0 or above."""
    schedule: Literal["steps", "cosine"] = "steps"
    """After the warm-up: times `decay` at each milestone, or a half cosine to 0 at the end."""
    milestones: tuple[float, ...] = (120, 160)
    """Epochs at which the rate drops, for `steps`."""
    decay: float = 0.1
    """Factor of each drop."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up, in epochs."""
    backbone_rate_scale: float = 1.0
    """Factor of the rate for all layers but the head; below 1 to keep more of given weights. Above 0."""
    frozen_epochs: float = 0.0
    """Epochs at the start in which the head alone is trained; the other layers' batch statistics follow the images."""

    def __post_init__(self) -> None:
        if not all(
            math.isfinite(value) for value in (self.learning_rate, self.weight_decay, self.warmup_epochs)
        ):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay} and warmup_epochs "
                f"{self.warmup_epochs} must be finite"
            )
        if not 0 < self.backbone_rate_scale < math.inf:
            raise ValueError(
                f"backbone_rate_scale is {self.backbone_rate_scale}, it must be above 0: 0.1 is usual with given "
                "weights; --optimizer.frozen-epochs keeps them unchanged"
            )
        if not 0 <= self.frozen_epochs < math.inf:
            raise ValueError(f"frozen_epochs is {self.frozen_epochs}, it must be 0 or above")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}, it must be in [0, 1]: 0.1 is usual")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, it must be above 0: 0.03 is usual")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, it must be in [0, 1): 0.9 is usual")
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay} and warmup_epochs {self.warmup_epochs}, both must be 0 or above"
            )
