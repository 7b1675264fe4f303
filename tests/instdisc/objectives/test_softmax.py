"""The softmax over every instance against its float64 transcription: any shape, temperature and number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from instdisc.settings.objectives import SoftmaxConfig
from tests import reference
from tests.instdisc.objectives.objective_steps import KINDS, Step, batch, rows_like, step, whole_batch
from tests.processes import run_ranks


def assert_formulas(
    steps: list[Step], config: SoftmaxConfig, kind: str, num_instances: int, dim: int
) -> None:
    rows = rows_like(kind, num_instances, dim).double().numpy()
    (embeddings,), ids = batch(kind, num_instances, dim)
    (loss,), (gradient,) = whole_batch(steps)
    for number, instance in enumerate(ids.tolist()):
        expected_loss, expected_gradient = 0.0, np.zeros(dim)
        if instance >= 0:
            expected_loss, expected_gradient = reference.softmax(
                embeddings[number].double().numpy(),
                instance,
                rows,
                temperature=config.temperature,
                proximal_weight=config.proximal_weight,
            )
        # Float32 scores of unit rows carry errors of some 1e-7/τ, of which many add up.
        tolerance = 4e-6 / config.temperature
        np.testing.assert_allclose(loss[number], expected_loss, rtol=1e-5, atol=tolerance)
        np.testing.assert_allclose(
            gradient[number], expected_gradient, rtol=0, atol=tolerance / config.temperature
        )


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_instances", "dim"), [(1, 3), (2, 128), (53, 7), (1009, 16)])
def test_one_rank_computes_the_formulas(temperature: float, kind: str, num_instances: int, dim: int) -> None:
    config = SoftmaxConfig(temperature=temperature, proximal_weight=0.5)
    assert_formulas(run_ranks(1, step, config, kind, num_instances, dim), config, kind, num_instances, dim)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("temperature", "kind"), [(0.01, "random"), (0.07, "duplicates"), (0.01, "opposite")]
)
def test_several_ranks_compute_the_formulas(world_size: int, temperature: float, kind: str) -> None:
    config = SoftmaxConfig(temperature=temperature)
    assert_formulas(run_ranks(world_size, step, config, kind, 53, 16), config, kind, 53, 16)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.001), ("proximal_weight", -1.0)])
def test_settings_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SoftmaxConfig(**{field: value})
