"""The softmax over every instance against its float64 transcription: any shape, temperature and number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.bank import Bank, random_unit_rows
from instdisc.objectives import Result, Softmax, SoftmaxConfig
from tests import reference
from tests.processes import run_ranks

GLOBAL_BATCH = 6


def rows_like(kind: str, num_instances: int, dim: int) -> torch.Tensor:
    rows = random_unit_rows(0, num_instances, dim, seed=7)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "duplicates":
        rows[1::2] = rows[: 2 * (num_instances // 2) : 2]
    elif kind == "opposite":
        rows = F.normalize(rows[:1] + 1e-3 * rows, dim=1)
    return rows


def batch(num_instances: int, dim: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = random_unit_rows(100, 100 + GLOBAL_BATCH, dim, seed=3)
    if kind == "opposite":
        embeddings = -rows_like(kind, num_instances, dim)[:1].repeat(GLOBAL_BATCH, 1)
    ids = torch.randperm(num_instances, generator=torch.Generator().manual_seed(0)).repeat(GLOBAL_BATCH)
    ids = ids[:GLOBAL_BATCH].clone()
    ids[2] = -1
    return embeddings, ids


def step(
    rank: int, world_size: int, config: SoftmaxConfig, kind: str, num_instances: int, dim: int
) -> Result:
    exchange, partition = Exchange(rank, world_size), Partition(num_instances, world_size)
    rows = rows_like(kind, num_instances, dim)
    bank = Bank(rows[partition.start(rank) : partition.stop(rank)], partition.start(rank))
    objective = Softmax(config, num_instances, dim)
    embeddings, ids = batch(num_instances, dim, kind)
    mine = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    queries, all_ids = exchange.gather(embeddings[mine], ids[mine])
    terms = objective.shard_terms(queries, all_ids, bank, torch.Generator(), exchange.log_sum_exp)
    return objective.merge(exchange.to_askers(terms), ids[mine])


def assert_formulas(
    results: list[Result], config: SoftmaxConfig, kind: str, num_instances: int, dim: int
) -> None:
    rows = rows_like(kind, num_instances, dim).double().numpy()
    embeddings, ids = batch(num_instances, dim, kind)
    loss = torch.cat([result.loss_B for result in results]).numpy()
    gradient = torch.cat([result.gradient_BD for result in results]).numpy()
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
@pytest.mark.parametrize("kind", ["random", "all equal", "duplicates", "opposite"])
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
