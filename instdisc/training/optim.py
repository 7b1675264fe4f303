"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from instdisc.settings.optimizer import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """SGD over `parameters`; its rate is set before every step from `learning_rate`."""
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def learning_rate(config: OptimizerConfig, epoch: float, num_epochs: int) -> float:
    """The rate at a moment of training.

    Args:
        config: Settings.
        epoch: Epochs done, fractions included, 0 … num_epochs.
        num_epochs: Length of the run.
    """
    if epoch < config.warmup_epochs:
        return config.learning_rate * epoch / config.warmup_epochs
    if config.schedule == "steps":
        drops = sum(epoch >= milestone for milestone in config.milestones)
        return config.learning_rate * config.decay**drops
    done = (epoch - config.warmup_epochs) / max(num_epochs - config.warmup_epochs, 1e-9)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
