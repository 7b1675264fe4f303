"""The learning rate over a run."""

from __future__ import annotations

import pytest

from instdisc.settings.optimizer import OptimizerConfig
from instdisc.training.optim import learning_rate


def test_steps_drop_at_the_milestones() -> None:
    config = OptimizerConfig()
    rates = [learning_rate(config, epoch, 200) for epoch in (0, 119.9, 120, 159.9, 160, 200)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_cosine_rises_and_falls() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="cosine", warmup_epochs=10)
    rates = [learning_rate(config, epoch, 110) for epoch in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("decay", -3.0),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("warmup_epochs", -1.0),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})
