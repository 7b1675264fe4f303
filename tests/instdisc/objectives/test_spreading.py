"""Invariant-spreading against automatic differentiation of its float64 transcription, in all its forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instdisc.settings.objectives import SpreadingConfig
from tests import reference
from tests.instdisc.objectives.objective_steps import KINDS, batch, step, whole_batch
from tests.processes import run_ranks


def expected(config: SpreadingConfig, kind: str, dim: int) -> tuple[Tensor, Tensor]:
    """Loss of the batch and gradient (2, B, D)."""
    embeddings, ids = batch(kind, 53, dim, views=2)
    f = embeddings.double().requires_grad_()
    present = f[:, ids >= 0]
    if config.form == "symmetric":
        queries = present.flatten(0, 1)
        keys = queries if config.key_gradient else queries.detach()
        loss = reference.spreading_symmetric(queries, keys, config.temperature)
    else:
        loss = reference.spreading_paper(present[0], present[1], config.temperature)
    (gradient,) = torch.autograd.grad(loss, f)
    return loss.detach(), gradient


def assert_formulas(world_size: int, config: SpreadingConfig, kind: str, dim: int = 7) -> None:
    losses, gradient = whole_batch(run_ranks(world_size, step, config, kind, 53, dim), views=2)
    loss, expected_gradient = expected(config, kind, dim)
    # Float32 scores carry errors of some 1e-7/τ; the probabilities are worked out in float64.
    tolerance = 1e-5 / config.temperature
    torch.testing.assert_close(losses.double().sum(), loss, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-5, atol=tolerance / config.temperature
    )


FORMS = [("symmetric", False), ("symmetric", True), ("paper", True)]


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "key_gradient"), FORMS)
def test_one_rank_computes_the_formulas(form: str, key_gradient: bool, kind: str, temperature: float) -> None:
    assert_formulas(1, SpreadingConfig(temperature=temperature, form=form, key_gradient=key_gradient), kind)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("form", "key_gradient"), FORMS)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_several_ranks_compute_the_formulas(
    world_size: int, form: str, key_gradient: bool, temperature: float
) -> None:
    config = SpreadingConfig(temperature=temperature, form=form, key_gradient=key_gradient)
    assert_formulas(world_size, config, "random", 3 if temperature < 0.1 else 16)


@pytest.mark.parametrize("form", ["symmetric", "paper"])
def test_similarity_to_the_other_view_is_reported_of_both(form: str) -> None:
    result = step(0, 1, SpreadingConfig(form=form, key_gradient=True), "random", 53, 7).result
    (first, second), ids = batch("random", 53, 7, views=2)
    expected = 2 * (first * second).sum(dim=1)[ids >= 0].sum()
    assert float(result.sums["positive_similarity"]) == pytest.approx(float(expected), rel=1e-5)


def test_first_views_that_would_learn_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="key_gradient"):
        SpreadingConfig(form="paper")


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        SpreadingConfig(temperature=0.0)
