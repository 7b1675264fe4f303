"""One step of a trainer, from its batch to what it did."""

from __future__ import annotations

from torch import Tensor

from instdisc.training.trainer import Trainer


def take_step(
    trainer: Trainer, images: Tensor, ids: Tensor, learning_rate: float, *, frozen: bool = False
) -> dict[str, float]:
    """Announce, launch and read a step; returns its means."""
    trainer.step(images, trainer.announce(ids), learning_rate, frozen=frozen)
    return trainer.read().means
