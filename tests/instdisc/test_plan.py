"""The plan beside what the exchange really sends and the bank really holds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc import plan
from instdisc.bank import Bank, random_unit_rows
from instdisc.objectives import OBJECTIVES, NCEConfig, SoftmaxConfig
from tests.processes import run_ranks

ROWS, DIM, BATCH = 3000, 64, 96


def step(rank: int, world_size: int, objective: str, dtype: str) -> tuple[int, int]:
    """The exchange of one step: bytes sent, and bytes of this rank's rows."""
    exchange, partition = Exchange(rank, world_size), Partition(ROWS, world_size)
    start, stop = partition.start(rank), partition.stop(rank)
    bank = Bank(random_unit_rows(start, stop, DIM, seed=0).to(getattr(torch, dtype)), start)
    config = NCEConfig(num_negatives=50) if objective == "nce" else SoftmaxConfig()
    ours = OBJECTIVES[type(config)](config, ROWS, DIM)
    local = BATCH // world_size
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    ids = order[rank * local :][:local]
    embeddings = F.normalize(torch.randn(local, DIM), dim=1)
    queries, all_ids = exchange.gather(embeddings.to(bank.rows.dtype), ids)
    terms = ours.shard_terms(queries, all_ids, bank, torch.Generator(), exchange.log_sum_exp)
    exchange.to_askers(terms)
    exchange.route(embeddings, all_ids, partition)
    return exchange.sent_bytes, bank.rows.numel() * bank.rows.element_size()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("objective", "dtype"), [("nce", "float32"), ("softmax", "bfloat16")])
def test_bytes_are_those_of_a_real_step(objective: str, dtype: str, world_size: int) -> None:
    config = plan.PlanConfig(
        objective=objective,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        embedding_dim=DIM,
        batch_size=BATCH,
        num_negatives=50,
    )
    cost = plan.cost(config, ROWS, world_size)
    sent, held = zip(*run_ranks(world_size, step, objective, dtype), strict=True)
    assert cost.sent_bytes == pytest.approx(sum(sent) / world_size, rel=0.02)
    assert cost.bank_bytes == max(held)


def test_times_follow_from_the_rates() -> None:
    config = plan.PlanConfig(dtype="float32", batch_size=256, gather_bytes_per_second=1e9)
    nce = plan.cost(config, 1_281_167, 1)
    assert nce.objective_seconds == pytest.approx(256 * 4096 * 128 * 4 / 1e9)
    assert (nce.sent_bytes, nce.exchange_seconds) == (0, 0)
    softmax = plan.PlanConfig(objective="softmax", batch_size=256, flops_per_second=1e12)
    assert plan.cost(softmax, 1_281_167, 1).objective_seconds == pytest.approx(
        4 * 256 * 1_281_167 * 128 / 1e12
    )


def test_the_table_holds_every_combination_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([]) == 0
    printed = capsys.readouterr().out
    for number in ("1,281,167", "10,000,000", "100,000,000", "1,000,000,000"):
        assert printed.count(f"{number} ") == 4
    assert "not measured" in printed
    assert "9e+11 bytes/s" in printed


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--instances", "1000000000", "20", "--world-size", "8", "96", "--memory-gigabytes", "16"])
    printed = capsys.readouterr().out
    assert "more than half of a rank's 16 GB" in printed
    assert "20 rows" in plan.report(plan.PlanConfig(instances=(20,), world_size=(32,)))
    assert "4,096 images cannot be shared by 96 ranks" in printed


@pytest.mark.parametrize("option", ["--batch-size", "--embedding-dim", "--instances"])
def test_impossible_size_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main([option, "0"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "must be" in said
