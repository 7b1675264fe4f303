"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from instdisc.model.backbone import head_of
from instdisc.model.sgd import SkippingSGD
from instdisc.settings.optimizer import OptimizerConfig


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> SkippingSGD:
    """SGD over a network that ends in its head; the rate is set before every step by `set_rate`.

    The first group of parameters is the network without the head, the second is the head, whose parameters are the last
    of the network's too: the optimizer numbers them as the network does.
    """
    head = list(head_of(network)[1].parameters())
    groups = [
        {"params": list(network.parameters())[: -len(head)], "rate_scale": config.backbone_rate_scale},
        {"params": head, "rate_scale": 1.0},
    ]
    return SkippingSGD(
        groups, learning_rate=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step; each group's is `learning_rate` times its `rate_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]


def freeze_backbone(optimizer: torch.optim.Optimizer) -> None:
    """Have the next step pass over all but the head, whatever gradients they have."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None


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
