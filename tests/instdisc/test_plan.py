"""The plan beside what the exchange really sends and a rank really holds."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from cluster.group import Worker
from instdisc import plan
from instdisc.model.backbone import build_embedder
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.settings.plan import PlanConfig
from instdisc.settings.recipes import RECIPES
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
from instdisc.training import costs
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
    config = PlanConfig(objective=objective, dtype=dtype, embedding_dim=DIM, batch_size=BATCH)
    cost = costs.cost(config, ROWS, world_size)
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
    config = PlanConfig(
        objective=objective,
        dtype="float32",
        batch_size=256,
        flops_per_second=2e12,
        gather_bytes_per_second=1e9,
    )
    alone, shared = costs.cost(config, 1_280_000, 1), costs.cost(config, 1_280_000, 2)
    assert alone.objective_seconds == pytest.approx(operations / 2e12 + gathered_bytes / 1e9)
    assert shared.objective_seconds == pytest.approx(alone.objective_seconds / 2, rel=0.01)
    assert (alone.sent_bytes, alone.exchange_seconds) == (0, 0)


def test_operations_of_a_network_are_those_of_its_layers() -> None:
    """ResNet-8 at 16 pixels: convolutions of 3×3 on maps of 16, 8 and 4 pixels, and the head."""
    size = costs.network_size(BackboneConfig(name="resnet8", embedding_dim=DIM), 16)
    wide, middle, narrow = 16 * 16, 8 * 8, 4 * 4
    products = 9 * wide * (3 * 16 + 2 * 16 * 16)
    products += 9 * middle * (16 * 32 + 32 * 32) + 9 * narrow * (32 * 64 + 64 * 64)
    assert size.operations == 2 * (products + 64 * DIM)
    network = build_embedder(BackboneConfig(name="resnet8", embedding_dim=DIM), 16)
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_a_step_is_the_sum_of_its_parts() -> None:
    config = PlanConfig(
        objective=SpreadingConfig(),
        batch_size=256,
        dtype="float32",
        network_flops_per_second=1e12,
        link_bytes_per_second=1e9,
        host_copy_bytes_per_second=1e9,
        storage_bytes_per_second=1e8,
    )
    network = costs.NetworkSize(operations=10**9, parameters=10**6)
    rank, run = costs.cost(config, 100_000, 4), costs.run_cost(config, network, 100_000, 4)
    assert run.network_seconds == pytest.approx(3 * 1e9 * 64 * 2 / 1e12)  # two views
    assert run.gradient_seconds == pytest.approx(2 * 4e6 * 3 / 4 / 1e9)
    parts = run.network_seconds + run.gradient_seconds + rank.exchange_seconds + rank.objective_seconds
    assert run.step_seconds == pytest.approx(parts)
    assert run.snapshot_bytes == 100_000 * DIM * 2 * 4 + 8e6  # D = 128, rows, weights and momentum
    assert run.write_seconds == pytest.approx(run.snapshot_bytes / 1e8)
    assert run.pause_seconds == pytest.approx((rank.memory_bytes + 8e6) / 1e9)


@pytest.mark.parametrize("world_size", [1, 8, 128])
@pytest.mark.parametrize("hours", [1.0, 100.0, 50_000.0])
def test_no_other_distance_of_snapshots_loses_less(world_size: int, hours: float) -> None:
    config = PlanConfig(rank_mtbf_hours=hours, storage_bytes_per_second=1e9)
    network = costs.NetworkSize(operations=8 * 10**9, parameters=24 * 10**6)
    run = costs.run_cost(config, network, 1_281_167, world_size)
    soonest = -(-run.write_seconds // run.step_seconds)
    times = (run.pause_seconds, run.write_seconds, config.restart_seconds, hours * 3600 / world_size)
    others = [run.every_steps * factor for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)]
    assert all(
        run.lost <= costs.lost(steps * run.step_seconds, *times) for steps in others if steps >= soonest
    )
    assert run.every_steps >= soonest


def test_a_recipe_brings_its_own_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    config = plan.parse(["sample", "--world-size", "2"])
    sample = RECIPES["sample"].config
    assert (config.objective, config.batch_size, config.network) == (sample.objective, 128, "resnet8")
    assert (config.image_size, config.world_size) == (24, (2,))
    assert plan.main(["sample", "--world-size", "2"]) == 0
    assert "82,960 weights" in capsys.readouterr().out
    assert plan.main(["resnet50"]) == 2
    assert "unknown recipe 'resnet50'" in capsys.readouterr().err


def test_number_of_negatives_belongs_to_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--objective", "infonce", "--num-negatives", "77"])
    assert "num_negatives=77" in capsys.readouterr().out
    assert plan.main(["--objective", "spreading", "--num-negatives", "77"]) == 2
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
    assert "20 rows" in plan.report(PlanConfig(instances=(20,), world_size=(32,)))
    assert "4,096 images cannot be shared by 96 ranks" in printed


@pytest.mark.parametrize("option", ["--batch-size", "--embedding-dim", "--instances"])
def test_impossible_size_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([option, "0"]) == 2
    assert re.match(rf"error: {option} is .*, expected ", capsys.readouterr().err)


def test_a_plan_is_made_without_torch() -> None:
    code = "import sys; from instdisc import plan; plan.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
