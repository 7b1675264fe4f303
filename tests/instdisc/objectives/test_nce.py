"""NCE against its float64 transcription, on one rank and on several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.common.metrics import TRAINING
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.loss import loss_and_gradient
from instdisc.objectives.nce import NCE
from instdisc.settings.objectives import NCEConfig
from tests import reference
from tests.processes import run_ranks

DIM = 16
SOUND = torch.tensor(True)
LOCAL_BATCHES = {1: 12, 2: 6, 3: 4}


def empty_bank(dim: int) -> Bank:
    return Bank(torch.empty(0, dim))


def unit(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def step(rank: int, world_size: int, num_instances: int, config: NCEConfig, dtype: torch.dtype) -> dict:
    """What the trainer does with the objective and the bank in one step, and what it drew."""
    exchange, partition = Exchange(rank, world_size), Partition(num_instances, world_size)
    start, stop = partition.start(rank), partition.stop(rank)
    bank = Bank(random_unit_rows(start, stop, DIM, seed=7).to(dtype), start)
    objective = NCE(config, num_instances, bank)
    local_batch = LOCAL_BATCHES[world_size]
    mine = slice(rank * local_batch, (rank + 1) * local_batch)
    embeddings, ids = unit(12, 1)[mine], all_ids(num_instances)[mine]
    generator = torch.Generator().manual_seed(100 + rank)
    all_rank_ids = exchange.announce(ids, flag=False).ids
    result, _ = loss_and_gradient(objective, bank, exchange, embeddings, all_rank_ids, generator)
    negatives, weight = objective.draw(12, bank, generator.manual_seed(100 + rank))
    sums = exchange.sum(torch.stack([*result.sums.values(), (ids >= 0).sum().double()]))
    objective.observe(dict(zip(result.sums, sums[:-1] / sums[-1], strict=True)), SOUND)
    owned_ids, rows = exchange.route(embeddings, all_rank_ids.flatten(), partition)
    bank.update(owned_ids, rows, momentum=0.5, sound=SOUND)
    return {
        "loss": result.loss_Q,
        "gradient": result.gradient_QD,
        "negatives": negatives + start,
        "weight": weight,
        "log_partition": float(objective.log_partition),
        "bank": bank.rows,
        "start": start,
    }


def all_ids(num_instances: int) -> torch.Tensor:
    """Distinct instances; the fifth image could not be decoded."""
    ids = torch.randperm(num_instances, generator=torch.Generator().manual_seed(2))[:12]
    ids[4] = -1
    return ids


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize(("num_negatives", "proximal_weight"), [(5, 0.0), (20, 3.0)])
def test_any_number_of_ranks_computes_the_formulas(
    world_size: int, temperature: float, num_negatives: int, proximal_weight: float
) -> None:
    num_instances = 53
    config = NCEConfig(temperature=temperature, num_negatives=num_negatives, proximal_weight=proximal_weight)
    ranks = run_ranks(world_size, step, num_instances, config, torch.float32)
    before = random_unit_rows(0, num_instances, DIM, seed=7).double().numpy()
    partition = math.exp(NCE(config, num_instances, empty_bank(DIM)).log_partition)
    expected_loss, expected_gradient, partitions = np.zeros(12), np.zeros((12, DIM)), []
    expected_bank = before.copy()
    embeddings = unit(12, 1).double().numpy()
    for number, instance in enumerate(all_ids(num_instances).tolist()):
        if instance < 0:
            continue
        drawn = np.concatenate([rank["negatives"][number].numpy() for rank in ranks])
        weights = np.concatenate([np.full(rank["negatives"].shape[1], rank["weight"]) for rank in ranks])
        assert weights.sum() == pytest.approx(num_negatives)
        expected_loss[number], expected_gradient[number], mass = reference.nce(
            embeddings[number],
            before[instance],
            before[drawn],
            weights,
            num_instances=num_instances,
            num_negatives=num_negatives,
            temperature=temperature,
            partition=partition,
            proximal_weight=proximal_weight,
        )
        partitions.append(mass)
        expected_bank[instance] = reference.bank_update(before[instance], embeddings[number], 0.5)
    scale = np.abs(expected_gradient).max()
    loss = torch.cat([rank["loss"] for rank in ranks]).numpy()
    gradient = torch.cat([rank["gradient"] for rank in ranks]).numpy()
    bank = torch.cat([rank["bank"] for rank in ranks]).numpy()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(bank, expected_bank, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)
    for rank in ranks:
        assert rank["log_partition"] == pytest.approx(math.log(np.mean(partitions)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_banks_agree_with_float32(dtype: torch.dtype) -> None:
    config = NCEConfig(num_negatives=40)
    exact, half = (run_ranks(1, step, 53, config, each)[0] for each in (torch.float32, dtype))
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(half["loss"], exact["loss"], rtol=tolerance, atol=tolerance)
    scale = exact["gradient"].abs().max().item()
    torch.testing.assert_close(half["gradient"], exact["gradient"], rtol=0, atol=tolerance * scale)
    assert half["bank"].dtype == dtype
    torch.testing.assert_close(half["bank"].float().norm(dim=1), torch.ones(53), rtol=0, atol=tolerance)


def test_gradient_is_the_derivative_of_the_loss() -> None:
    config = NCEConfig(num_negatives=8, temperature=0.2, proximal_weight=2.0)
    bank = Bank(random_unit_rows(0, 30, DIM, seed=3))
    objective = NCE(config, 30, bank)
    f, ids = unit(2, 5).double(), torch.tensor([3, 4])

    def at(queries: torch.Tensor) -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        result, _ = loss_and_gradient(objective, bank, Exchange(0, 1), queries.float(), ids[None], generator)
        return float(result.loss_Q[0]), result.gradient_QD[0]

    delta = 1e-2
    ahead, behind = f.clone(), f.clone()
    ahead[0, 6] += delta
    behind[0, 6] -= delta
    numeric = (at(ahead)[0] - at(behind)[0]) / (2 * delta)
    assert at(f)[1][6].item() == pytest.approx(numeric, rel=1e-2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_sampled_negatives_are_unbiased(world_size: int) -> None:
    """The mean over many draws is the closed form: m times the mean over all rows, with uneven shards too."""
    num_instances, num_negatives, draws = 23, 5, 40_000
    config = NCEConfig(temperature=0.3, num_negatives=num_negatives)
    objective = NCE(config, num_instances, empty_bank(DIM))
    rows = random_unit_rows(0, num_instances, DIM, seed=9)
    query = unit(1, 11)
    partition = Partition(num_instances, world_size)
    parts = []
    for rank in range(world_size):
        bank = Bank(rows[partition.start(rank) : partition.stop(rank)], partition.start(rank))
        generator = torch.Generator().manual_seed(rank)
        negatives, weight = objective.draw(draws, bank, generator)
        parts.append(objective.negative_terms(query.expand(draws, DIM), negatives, weight, bank.rows))
    loss = torch.stack([part[:, DIM] for part in parts]).sum(dim=0).double()
    gradient = torch.stack([part[:, :DIM] for part in parts]).sum(dim=0).double()
    logits = (rows @ query[0]).double() / config.temperature - objective.log_partition
    logits += math.log(num_instances / num_negatives)
    expected_loss = num_negatives * F.softplus(logits).mean()
    coefficients = torch.sigmoid(logits) / config.temperature
    expected_gradient = num_negatives * (coefficients[:, None] * rows.double()).mean(dim=0)
    assert abs(loss.mean() - expected_loss) < 5 * loss.std() / math.sqrt(draws)
    assert (
        (gradient.mean(dim=0) - expected_gradient).abs() < 5 * gradient.std(dim=0) / math.sqrt(draws)
    ).all()


def test_negatives_cover_every_row_evenly() -> None:
    objective = NCE(NCEConfig(num_negatives=50), 200, empty_bank(DIM))
    bank = Bank(random_unit_rows(0, 200, DIM, seed=1))
    negatives, weight = objective.draw(2000, bank, torch.Generator().manual_seed(4))
    counts = torch.bincount(negatives.flatten(), minlength=200).double()
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert weight == 1
    assert abs(chi_squared - 199) < 5 * math.sqrt(2 * 199)


@pytest.mark.parametrize("block_bytes", [1, 3 * 7 * DIM * 4, 1 << 20])
@pytest.mark.parametrize("rows_per_negative", [0, 100])
def test_blocks_and_the_way_to_the_scores_change_nothing(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, rows_per_negative: int
) -> None:
    objective = NCE(NCEConfig(num_negatives=7), 50, empty_bank(DIM))
    bank, queries = Bank(random_unit_rows(0, 50, DIM, seed=1)), unit(11, 2)
    negatives, weight = objective.draw(11, bank, torch.Generator().manual_seed(4))
    negatives[:, 3] = negatives[:, 5]  # a row may be drawn twice
    expected = objective.negative_terms(queries, negatives, weight, bank.rows)
    monkeypatch.setattr("instdisc.objectives.nce._BLOCK_BYTES", {"cpu": block_bytes})
    monkeypatch.setattr("instdisc.objectives.nce._DENSE_ROWS_PER_NEGATIVE", rows_per_negative)
    torch.testing.assert_close(objective.negative_terms(queries, negatives, weight, bank.rows), expected)


@pytest.mark.parametrize("mode", ["moving-average", "frozen"])
def test_log_partition_follows_or_freezes(mode: str) -> None:
    config = NCEConfig(log_partition_mode=mode, log_partition_momentum=0.9, log_partition_batches=2)
    objective = NCE(config, 100, empty_bank(DIM))
    seen = []
    for partition in (200.0, 400.0, 1000.0):
        means = {"partition_ratio": partition / torch.exp(objective.log_partition)}
        objective.observe({"partition_ratio": torch.tensor(torch.nan)}, ~SOUND)  # which changes nothing
        objective.observe(means, SOUND)
        seen.append(math.exp(objective.log_partition))
    expected = [200, 300, 300] if mode == "frozen" else [200, 220, 298]
    assert seen == pytest.approx(expected)
    resumed = NCE(config, 100, empty_bank(DIM))
    resumed.load_state_dict(objective.state_dict())
    for each in (objective, resumed):
        each.observe({"partition_ratio": torch.tensor(5.0)}, SOUND)
    assert resumed.log_partition == objective.log_partition


@pytest.mark.parametrize("dim", [2, 128])
def test_the_smallest_temperature_overflows_nowhere(dim: int) -> None:
    bank = Bank(random_unit_rows(0, 30, dim, seed=3))
    objective = NCE(NCEConfig(temperature=0.005, num_negatives=20), 30, bank)
    for queries in (bank.rows[:4], -bank.rows[:4]):
        ids = torch.arange(4)
        result, _ = loss_and_gradient(
            objective, bank, Exchange(0, 1), queries, ids[None], torch.Generator().manual_seed(1)
        )
        objective.observe({name: value / 4 for name, value in result.sums.items()}, SOUND)
        assert math.isfinite(objective.log_partition)
        assert torch.isfinite(result.loss_Q).all()
        assert torch.isfinite(result.gradient_QD).all()


def test_first_log_partition_fits_a_random_bank() -> None:
    rows = random_unit_rows(0, 20_000, 128, seed=1)
    query = F.normalize(torch.randn(1, 128, generator=torch.Generator().manual_seed(3)), dim=1)
    actual = torch.logsumexp((rows @ query[0]).double() / 0.07, dim=0)
    first = NCE(NCEConfig(), 20_000, empty_bank(128)).log_partition
    assert float(first) == pytest.approx(float(actual), abs=0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 0.001),
        ("temperature", float("nan")),
        ("num_negatives", 0),
        ("proximal_weight", -1.0),
        ("log_partition_momentum", 1.0),
        ("log_partition_batches", 0),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        NCEConfig(**{field: value})


def test_workers_export_log_partition() -> None:
    assert "log_partition" in NCE(NCEConfig(), 20, empty_bank(DIM)).numbers()
    assert any((metric.name, metric.kind) == ("log_partition", "gauge") for metric in TRAINING.metrics)
