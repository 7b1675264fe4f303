"""An objective that only this file knows is trained and planned: nothing else has a list of them to be extended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from cluster.group import Worker
from instdisc import plan
from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries, MergeLogSums, Objective
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import ObjectiveConfig, StepCost
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from tests.steps import take_step

ROWS, DIM, BATCH = 40, 16, 8


@dataclass(frozen=True, kw_only=True)
class PullConfig(ObjectiveConfig):
    """Embeddings are drawn to their rows, and nothing pushes them apart."""

    name: ClassVar[str] = "pull"
    implementation: ClassVar[str] = f"{__name__}:Pull"
    tables_beside_bank: ClassVar[int] = 1
    strength: float = 1.0

    def warnings(self, num_instances: int) -> list[str]:
        return [f"{num_instances} images will collapse to one point"]

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        return StepCost(0, num_queries * share)


class Pull(Objective):
    """`J = -strength · v_i·f_i / τ`, with a count of the steps and a table that nothing reads."""

    def __init__(self, config: PullConfig, num_instances: int, bank: Bank) -> None:
        self.config: PullConfig = config
        self.seen = torch.zeros_like(bank.rows, dtype=torch.float32)
        self.updates = torch.zeros((), dtype=torch.float64)

    def shard_terms(
        self, queries: BatchQueries, bank: Bank, generator: torch.Generator, merge_log_sums: MergeLogSums
    ) -> Tensor:
        positions_G, owned_G = bank.local(queries.instance_ids_G)
        rows_GD = torch.where(owned_G[:, None], bank.rows[positions_G], 0)
        similarity_G1 = (queries.embeddings_GD * rows_GD).sum(dim=1, keepdim=True)
        scale = self.config.strength / self.config.temperature
        return torch.cat([-scale * rows_GD, -scale * similarity_G1, similarity_G1], dim=1)

    def update(self, learning_rate: float, num_queries: int, sound: Tensor) -> None:
        self.updates.add_(sound)

    def numbers(self) -> dict[str, Tensor]:
        return {"log_partition": self.updates}

    def tables(self) -> dict[str, Tensor]:
        return {"seen": self.seen}


def test_it_is_trained() -> None:
    config = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=32),
        backbone=BackboneConfig(name="resnet8", embedding_dim=DIM),
        bank=BankConfig(momentum=0.999),
        objective=PullConfig(temperature=0.5, strength=2.0),
        training=TrainingConfig(batch_size=BATCH, precision="float32"),
    )
    trainer = Trainer(Worker(0, 1, 0, 1, 0, torch.device("cpu")), config, ROWS)
    images, ids = torch.randn(1, BATCH, 3, 32, 32), torch.arange(BATCH)
    first, second = (take_step(trainer, images, ids, 0.1) for _ in range(2))
    assert isinstance(trainer.objective, Pull)
    assert first["loss"] == pytest.approx(-4 * first["positive_similarity"], rel=1e-5)
    assert second["positive_similarity"] > first["positive_similarity"]
    assert trainer.objective.state_dict() == {"log_partition": 2}
    assert config.settings()["objective"] == {"temperature": 0.5, "strength": 2.0}
    assert config.objective.warnings(ROWS) == ["40 images will collapse to one point"]


def test_it_is_planned() -> None:
    config = plan.PlanConfig(
        objective=PullConfig(strength=3.0),
        instances=(1000,),
        world_size=(1,),
        embedding_dim=DIM,
        batch_size=BATCH,
        dtype="float32",
        gather_bytes_per_second=1e3,
    )
    cost = plan.cost(config, 1000, 1)
    assert cost.memory_bytes == 1000 * DIM * 4 * 2
    assert cost.objective_seconds == pytest.approx(BATCH * DIM * 4 / 1e3)
    assert "PullConfig(temperature=0.07, strength=3.0)" in plan.report(config)


def test_settings_are_checked_as_those_of_all_objectives() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0\.0, expected at least 0\.005; usual"):
        PullConfig(temperature=0.0)
