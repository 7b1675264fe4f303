"""The parametric softmax: loss, gradient of the embeddings and training of the sharded weights, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instdisc.settings.objectives import ParametricSoftmaxConfig
from tests.instdisc.objectives.objective_steps import KINDS, batch, rows_like, step
from tests.processes import run_ranks

DIM, RATE = 7, 0.3


def two_steps(
    rank: int, world_size: int, config: ParametricSoftmaxConfig, kind: str, num_instances: int
) -> tuple[Tensor, Tensor, Tensor]:
    result, objective, bank = step(rank, world_size, config, kind, num_instances, DIM)
    _, ids = batch(kind, num_instances, DIM)
    objective.update(RATE, len(ids), torch.tensor(True))
    weights = objective.tables()["weights"].clone()
    # The momentum goes on without a gradient.
    objective.update(RATE, len(ids), torch.tensor(True))
    assert torch.equal(bank.rows, rows_like(kind, num_instances, DIM)[bank.start : bank.stop])
    return result.loss_Q, result.gradient_QD, torch.stack([weights, objective.tables()["weights"]])


def assert_formulas(world_size: int, config: ParametricSoftmaxConfig, kind: str, num_instances: int) -> None:
    ranks = run_ranks(world_size, two_steps, config, kind, num_instances)
    (embeddings,), ids = batch(kind, num_instances, DIM)
    f = embeddings.double().requires_grad_()
    weights = rows_like(kind, num_instances, DIM).double().requires_grad_()
    logits = f @ weights.T / config.temperature
    losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none", ignore_index=-1)
    by_embeddings, by_weights = torch.autograd.grad(losses.sum(), (f, weights))
    momentum = by_weights / len(ids) + config.weight_decay * weights.detach()
    once = weights.detach() - RATE * momentum
    twice = once - RATE * (config.momentum * momentum + config.weight_decay * once)
    tolerance = 1e-5 / config.temperature
    torch.testing.assert_close(
        torch.cat([rank[0] for rank in ranks]).double(), losses, rtol=1e-5, atol=tolerance
    )
    torch.testing.assert_close(
        torch.cat([rank[1] for rank in ranks]).double(),
        by_embeddings,
        rtol=0,
        atol=tolerance / config.temperature,
    )
    trained = torch.cat([rank[2] for rank in ranks], dim=1).double()
    torch.testing.assert_close(
        trained, torch.stack([once, twice]), rtol=0, atol=tolerance / config.temperature
    )


@pytest.mark.parametrize("block", [5, 4096])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_instances", [1, 53, 1009])
def test_one_rank_computes_the_formulas(
    monkeypatch: pytest.MonkeyPatch, block: int, temperature: float, kind: str, num_instances: int
) -> None:
    monkeypatch.setattr("instdisc.objectives.parametric._BLOCK_ROWS", {"cpu": block})
    config = ParametricSoftmaxConfig(temperature=temperature, momentum=0.8, weight_decay=0.1)
    assert_formulas(1, config, kind, num_instances)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_compute_the_formulas(world_size: int) -> None:
    assert_formulas(world_size, ParametricSoftmaxConfig(), "duplicates", 53)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("momentum", 1.0), ("weight_decay", -1.0)]
)
def test_settings_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        ParametricSoftmaxConfig(**{field: value})
