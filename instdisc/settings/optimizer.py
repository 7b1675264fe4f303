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
    """From 0 to below 1."""
    weight_decay: Amount = 1e-4
    """0 or above."""
    schedule: Literal["steps", "cosine"] = "steps"
    """After the warm-up: times `decay` at each milestone, or a half cosine to 0 at the end."""
    milestones: tuple[float, ...] = (120, 160)
    """Epochs at which the rate drops, for `steps`."""
    decay: Annotated[float, Range(at_least=0, at_most=1, usual="0.1")] = 0.1
    """Factor of each drop."""
    warmup_epochs: Amount = 0.0
    """Length of the linear warm-up, in epochs."""
