"""Settings of the objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """The softmax over every instance."""

    temperature: float = 0.07
    """τ, at least 0.005; 0.07 to 0.2 are usual. Smaller tells neighbors apart more sharply."""
    proximal_weight: float = 0.0
    """λ of the proximal term ‖f_i - v_i‖², 0 or above; v_i is the row before this step's update."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_proximal_weight(self.proximal_weight)


@dataclass(frozen=True, kw_only=True)
class NCEConfig:
    """Noise-contrastive estimation; τ and m are those of Wu et al. 2018, who freeze Z and add a proximal term."""

    temperature: float = 0.07
    """τ, at least 0.005; 0.07 to 0.2 are usual. Smaller tells neighbors apart more sharply."""
    num_negatives: int = 4096
    """m, noise samples for each image, drawn uniformly from the whole bank."""
    proximal_weight: float = 0.0
    """λ of the proximal term ‖f_i - v_i‖², 0 or above; v_i is the row before this step's update."""
    log_partition_mode: Literal["moving-average", "frozen"] = "moving-average"
    """How Z is estimated: followed all along, or averaged over the first batches and kept, as in the paper (which can
    diverge on small data)."""
    log_partition_momentum: float = 0.99
    """Weight of the past in the moving average of Z, from 0 to below 1."""
    log_partition_batches: int = 1
    """Batches that the frozen Z is averaged over, at least 1."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}, it must be at least 1: 4096 is usual")
        _check_proximal_weight(self.proximal_weight)
        if not 0 <= self.log_partition_momentum < 1:
            raise ValueError(
                f"log_partition_momentum is {self.log_partition_momentum}, it must be in [0, 1): 0.99 is usual"
            )
        if self.log_partition_batches < 1:
            raise ValueError(f"log_partition_batches is {self.log_partition_batches}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class InfoNCEConfig(SoftmaxConfig):
    """The softmax over the positive and m sampled rows."""

    num_negatives: int = 65_536
    """m, rows of the bank that the positive is told apart from."""
    shared_negatives: bool = True
    """Draw the negatives once for all images of a batch, or of its part (`--training.accumulation`), which costs a
    small part of drawing for every image anew. Rows of these images are then left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}, it must be at least 1: 65536 is usual")


@dataclass(frozen=True, kw_only=True)
class ParametricSoftmaxConfig:
    """The softmax over trained weights, one row per instance."""

    temperature: float = 0.1
    """τ, at least 0.005; 0.07 to 0.2 are usual."""
    momentum: float = 0.9
    """Of the SGD that trains the weights, from 0 to below 1; its rate is that of the network."""
    weight_decay: float = 0.0
    """Of that SGD, 0 or above."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, it must be in [0, 1): 0.9 is usual")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, it must be 0 or above")


@dataclass(frozen=True, kw_only=True)
class SpreadingConfig:
    """The softmax within the batch, over two views; the defaults are those of the public code of Ye et al. 2019."""

    temperature: float = 0.1
    """τ, at least 0.005; 0.07 to 0.2 are usual."""
    form: Literal["symmetric", "paper"] = "symmetric"
    """Both views as queries and keys alike, as in the authors' code, or second views against first ones, as in the
    equations of the paper. Loss and gradient are means over the embeddings of both views, also of the paper's."""
    key_gradient: bool = False
    """Let the gradient through both operands of a similarity. Off, as in the authors' code: keys are constants. The
    paper's form needs it: first views are keys alone."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.form == "paper" and not self.key_gradient:
            raise ValueError(
                "form is paper and key_gradient off, but first views would learn nothing: add --objective.key-gradient"
            )


ObjectiveConfig = NCEConfig | SoftmaxConfig | InfoNCEConfig | ParametricSoftmaxConfig | SpreadingConfig


def _check_temperature(temperature: float) -> None:
    """Refuse a τ that exponentials of `similarity/τ` cannot bear.

    Raises:
        ValueError: τ is below 0.005 or not a number.
    """
    if not 0.005 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, it must be at least 0.005: 0.07 to 0.2 are usual")


def _check_proximal_weight(weight: float) -> None:
    """Refuse a negative λ.

    Raises:
        ValueError: λ is below 0 or not a number.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"proximal_weight is {weight}, it must be 0 or above")
