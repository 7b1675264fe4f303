"""Sampled softmax against its float64 transcription: negatives shared or not, any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instdisc.common.errors import ConfigError
from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries
from instdisc.objectives.infonce import InfoNCE
from instdisc.settings.objectives import InfoNCEConfig
from tests import reference
from tests.instdisc.objectives.objective_steps import KINDS, batch, rows_like, step, whole_batch
from tests.processes import run_ranks


def drawn_by(rank: int, config: InfoNCEConfig, bank: Bank, num_instances: int, dim: int) -> tuple:
    """The negatives of a rank as instance ids, one row per query, and the weight of each draw."""
    (embeddings,), ids = batch("random", num_instances, dim)
    queries = BatchQueries(embeddings, ids, 1, slice(0, 0), ids)
    objective = InfoNCE(config, num_instances, bank)
    negatives, weight = objective.draw(queries, bank, torch.Generator().manual_seed(100 + rank))
    start, stop, rows, total = bank.start, bank.stop, len(bank.rows), num_instances
    if config.shared_negatives:  # they stand for the rows of no image of the batch
        seen = {instance for instance in ids.tolist() if instance >= 0}
        rows, total = rows - sum(start <= each < stop for each in seen), total - len(seen)
        assert not seen & {start + position for position in negatives.tolist()}
    if rows:
        count = max(1, round(config.num_negatives * len(bank.rows) / num_instances))
        assert negatives.shape[-1] == count
        assert weight == pytest.approx(config.num_negatives * rows / total / count)
    return negatives.expand(len(ids), -1) + start, weight


def assert_formulas(world_size: int, config: InfoNCEConfig, kind: str, num_instances: int, dim: int) -> None:
    steps = run_ranks(world_size, step, config, kind, num_instances, dim)
    rows = rows_like(kind, num_instances, dim).double().numpy()
    (embeddings,), ids = batch(kind, num_instances, dim)
    draws = [drawn_by(rank, config, each.bank, num_instances, dim) for rank, each in enumerate(steps)]
    (loss,), (gradient,) = whole_batch(steps)
    for number, instance in enumerate(ids.tolist()):
        expected_loss, expected_gradient = 0.0, np.zeros(dim)
        if instance >= 0:
            negatives = torch.cat([ids_GK[number] for ids_GK, _ in draws])
            weights = torch.cat([torch.full((ids_GK.shape[1],), weight) for ids_GK, weight in draws])
            kept = negatives != instance
            expected_loss, expected_gradient = reference.infonce(
                embeddings[number].double().numpy(),
                rows[instance],
                rows[negatives[kept]],
                weights[kept].double().numpy(),
                temperature=config.temperature,
                proximal_weight=config.proximal_weight,
            )
        tolerance = 4e-6 / config.temperature
        np.testing.assert_allclose(loss[number], expected_loss, rtol=1e-5, atol=tolerance)
        np.testing.assert_allclose(
            gradient[number], expected_gradient, rtol=0, atol=tolerance / config.temperature
        )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_instances", "num_negatives"), [(1, 1), (9, 40), (1009, 64)])
def test_one_rank_computes_the_formulas(
    shared: bool, temperature: float, kind: str, num_instances: int, num_negatives: int
) -> None:
    config = InfoNCEConfig(
        temperature=temperature,
        num_negatives=num_negatives,
        shared_negatives=shared,
        proximal_weight=0.5,
    )
    _, ids = batch(kind, num_instances, 7)
    if shared and len(ids[ids >= 0].unique()) == num_instances:
        with pytest.raises(ConfigError, match=rf"holds all {num_instances} images.*--training\.batch-size"):
            step(0, 1, config, kind, num_instances, 7)
    else:
        assert_formulas(1, config, kind, num_instances, 7)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_instances", [6, 53])
def test_several_ranks_compute_the_formulas(world_size: int, shared: bool, num_instances: int) -> None:
    """Of 6 images the batch leaves one, so that all rows of some ranks are of the batch."""
    config = InfoNCEConfig(num_negatives=40, shared_negatives=shared)
    assert_formulas(world_size, config, "random", num_instances, 16)


def test_shared_negatives_cover_the_rows_outside_of_the_batch_evenly() -> None:
    config = InfoNCEConfig(num_negatives=60_000)
    bank = Bank(rows_like("random", 20, 8)[5:15], 5)
    ids = torch.tensor([5, 14, 9, -1, 9, 3, 10])
    queries = BatchQueries(torch.zeros(len(ids), 8), ids, 1, slice(0, 0), ids)
    negatives, _ = InfoNCE(config, 20, bank).draw(queries, bank, torch.Generator().manual_seed(0))
    counts = torch.bincount(negatives, minlength=10)
    assert (counts == 0).tolist() == [position + 5 in ids.tolist() for position in range(10)]
    assert abs(counts[counts > 0] - 5000).max() < 5 * 5000**0.5


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = InfoNCEConfig(num_negatives=64, shared_negatives=False)
    whole = step(0, 1, config, "random", 53, 16).result
    monkeypatch.setattr("instdisc.objectives.infonce._BLOCK_BYTES", {"cpu": 4 * 64 * 16 * 4})
    torch.testing.assert_close(step(0, 1, config, "random", 53, 16).result.gradient_QD, whole.gradient_QD)


@pytest.mark.parametrize("shared", [True, False])
def test_with_many_negatives_it_becomes_the_full_softmax(shared: bool) -> None:
    """Σ over m draws, times n/m, estimates the sum over all rows; the gradient is that of the other rows' softmax."""
    config = InfoNCEConfig(temperature=0.5, num_negatives=200_000, shared_negatives=shared)
    (loss,), _ = whole_batch([step(0, 1, config, "random", 53, 16)])
    (embeddings,), ids = batch("random", 53, 16)
    scores = embeddings @ rows_like("random", 53, 16).T / config.temperature
    for number, instance in enumerate(ids.tolist()):
        if instance >= 0:
            others = torch.ones(53, dtype=torch.bool)
            others[ids[ids >= 0] if shared else instance] = False
            mass = config.num_negatives * scores[number, others].exp().mean()
            if not shared:
                mass = mass * 52 / 53
            expected = torch.log(mass + scores[number, instance].exp()) - scores[number, instance]
            assert float(loss[number]) == pytest.approx(float(expected), abs=5e-3)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("num_negatives", 0)])
def test_settings_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        InfoNCEConfig(**{field: value})
