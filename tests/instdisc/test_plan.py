"""The plan beside what the exchange really sends and a rank really holds."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from cluster.group import Worker
from instdisc import plan
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from tests.processes import run_ranks
from tests.steps import take_step

CONFIGS = [
    NCEConfig(num_negatives=50),
    SoftmaxConfig(),
    InfoNCEConfig(num_negatives=50),
    ParametricSoftmaxConfig(),
    SpreadingConfig(),
]
ROWS, DIM, BATCH = 3000, 64, 96


def step(rank: int, world_size: int, objective: ObjectiveConfig, dtype: Any) -> tuple[int, int]:
    """One step of training: bytes sent, and bytes of this rank's rows and the objective's tables."""
    config = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=32),
        backbone=BackboneConfig(name="resnet8", embedding_dim=DIM),
        bank=BankConfig(dtype=dtype),
        objective=objective,
        training=TrainingConfig(batch_size=BATCH),
    )
    worker = Worker(rank, world_size, rank, world_size, 0, torch.device("cpu"))
    trainer = Trainer(worker, config, ROWS)
    local = BATCH // world_size
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[rank * local :][:local]
    take_step(trainer, torch.randn(objective.views, local, 3, 32, 32), ids, 0.01)
    rows = trainer.bank.rows
    held = rows.numel() * (rows.element_size() + 4 * objective.tables_beside_bank)
    return trainer.exchange.sent_bytes, held


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("objective", CONFIGS, ids=lambda objective: objective.name)
def test_bytes_are_those_of_a_real_step(objective: ObjectiveConfig, world_size: int) -> None:
    dtype: Any = "bfloat16" if objective.name == "softmax" else "float32"
    config = plan.PlanConfig(objective=objective, dtype=dtype, embedding_dim=DIM, batch_size=BATCH)
    cost = plan.cost(config, ROWS, world_size)
    sent, held = zip(*run_ranks(world_size, step, objective, dtype), strict=True)
    assert cost.sent_bytes == pytest.approx(sum(sent) / world_size, rel=0.02)
    assert cost.memory_bytes == max(held)


@pytest.mark.parametrize(
    ("objective", "operations", "gathered_bytes"),
    [
        (NCEConfig(), 0, 256 * 4096 * 512),
        (SoftmaxConfig(), 4 * 256 * 1_280_000 * 128, 0),
        (InfoNCEConfig(), 4 * 256 * 65_536 * 128, 65_536 * 512),
        (InfoNCEConfig(shared_negatives=False), 0, 256 * 65_536 * 512),
        (ParametricSoftmaxConfig(), 10 * 256 * 1_280_000 * 128, 0),
        (SpreadingConfig(), 4 * 512 * 512 * 128, 0),
    ],
)
def test_time_of_an_objective_follows_from_the_rates(
    objective: ObjectiveConfig, operations: int, gathered_bytes: int
) -> None:
    config = plan.PlanConfig(
        objective=objective,
        dtype="float32",
        batch_size=256,
        flops_per_second=2e12,
        gather_bytes_per_second=1e9,
    )
    alone, shared = plan.cost(config, 1_280_000, 1), plan.cost(config, 1_280_000, 2)
    assert alone.objective_seconds == pytest.approx(operations / 2e12 + gathered_bytes / 1e9)
    assert shared.objective_seconds == pytest.approx(alone.objective_seconds / 2, rel=0.01)
    assert (alone.sent_bytes, alone.exchange_seconds) == (0, 0)


def test_number_of_negatives_belongs_to_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--objective", "infonce", "--num-negatives", "77"])
    assert "num_negatives=77" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--objective", "spreading", "--num-negatives", "77"])
    assert "spreading draws none" in capsys.readouterr().err


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
    assert "expected" in said


def test_a_plan_is_made_without_torch() -> None:
    code = "import sys; from instdisc import plan; plan.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
