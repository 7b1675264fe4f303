"""One step on one rank and on several: the same weights; and nothing changes where numbers are not finite."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.group import Worker
from instdisc.common.errors import ConfigError, NonFiniteError
from instdisc.model import backbone
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from tests.processes import run_ranks
from tests.steps import take_step

NUM_INSTANCES, DIM, GLOBAL_BATCH, RATE = 61, 8, 12, 0.5
NCE = NCEConfig(num_negatives=9, temperature=0.2, proximal_weight=1.5)
PARAMETRIC = ParametricSoftmaxConfig(temperature=0.2)
SPREADING = SpreadingConfig(temperature=0.2, key_gradient=True)


def without_batch_norm(num_outputs: int) -> nn.Module:
    """A network in which images do not touch each other."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, num_outputs))


def make_trainer(rank: int, world_size: int, **training: Any) -> Trainer:
    backbone.CIFAR_RESNETS["plain"] = without_batch_norm
    config = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=8),
        backbone=BackboneConfig(name=training.pop("name", "plain"), embedding_dim=DIM),
        objective=training.pop("objective", NCE),
        optimizer=OptimizerConfig(momentum=training.pop("momentum", 0.0), weight_decay=0.0),
        bank=BankConfig(momentum=0.5),
        training=TrainingConfig(batch_size=GLOBAL_BATCH, precision="float32", seed=4, **training),
    )
    return Trainer(Worker(rank, world_size, rank, world_size, 0, torch.device("cpu")), config, NUM_INSTANCES)


def global_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(NUM_INSTANCES, generator=generator)[:GLOBAL_BATCH]
    ids[3] = -1
    return torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator), ids


def my_part(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    images, ids = global_batch()
    share = GLOBAL_BATCH // world_size
    return images[None, rank * share : (rank + 1) * share], ids[rank * share : (rank + 1) * share]


def one_step(
    rank: int, world_size: int, training: dict[str, Any]
) -> tuple[list[Tensor], Tensor, dict[str, float]]:
    """All rows of the bank alike, so that it does not matter which negatives are drawn."""
    trainer = make_trainer(rank, world_size, **training)
    trainer.bank.rows[:] = F.normalize(torch.ones(DIM), dim=0)
    means = take_step(trainer, *my_part(rank, world_size), learning_rate=RATE)
    return [parameter.detach() for parameter in trainer.embedder.parameters()], trainer.bank.rows, means


def expected_step() -> tuple[list[Tensor], Tensor, float]:
    """The same step by autograd in float64 on the whole batch."""
    trainer = make_trainer(0, 1)
    config, network = trainer.config.objective, trainer.embedder.backbone.double()
    images, ids = global_batch()
    row = F.normalize(torch.ones(DIM, dtype=torch.float64), dim=0)
    f = F.normalize(network(images.double()), dim=1)
    probability = torch.exp(f @ row / config.temperature) / math.exp(trainer.objective.log_partition)
    noise = config.num_negatives / NUM_INSTANCES
    h = probability / (probability + noise)
    losses = -torch.log(h) - config.num_negatives * torch.log(1 - h)
    losses = losses + config.proximal_weight * (f - row).square().sum(dim=1)
    losses = losses[ids >= 0]
    (losses.sum() / GLOBAL_BATCH).backward()
    parameters = [parameter.detach() - RATE * parameter.grad for parameter in network.parameters()]
    bank = row.expand(NUM_INSTANCES, DIM).clone()
    bank[ids[ids >= 0]] = F.normalize(0.5 * row + 0.5 * f[ids >= 0].detach(), dim=1)
    return parameters, bank, float(losses.mean().detach())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_ranks_makes_the_same_step(world_size: int, accumulation: int) -> None:
    parameters, bank, loss = expected_step()
    ranks = run_ranks(world_size, one_step, {"accumulation": accumulation})
    for rank_parameters, _, means in ranks:
        for actual, expected in zip(rank_parameters, parameters, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
        assert means["loss"] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]).double(), bank, rtol=0, atol=1e-6)


def one_step_of_two_views(rank: int, world_size: int) -> tuple[list[Tensor], Tensor, dict[str, float]]:
    """The second view of every image is the first one mirrored."""
    trainer = make_trainer(rank, world_size, objective=SPREADING)
    images, ids = my_part(rank, world_size)
    means = take_step(trainer, torch.cat([images, images.flip(-1)]), ids, learning_rate=RATE)
    return [parameter.detach() for parameter in trainer.embedder.parameters()], trainer.bank.rows, means


def expected_step_of_two_views() -> tuple[list[Tensor], Tensor, dict[str, float]]:
    """The same step by autograd in float64 on the whole batch, and what it reports."""
    trainer = make_trainer(0, 1, objective=SPREADING)
    network, (images, ids) = trainer.embedder.backbone.double(), global_batch()
    images, ids = images[ids >= 0].double(), ids[ids >= 0]
    outputs = network(torch.cat([images, images.flip(-1)]))
    f = F.normalize(outputs, dim=1)
    number = torch.arange(len(f))
    positive = number.roll(len(ids))
    probability = torch.softmax(
        (f @ f.T / SPREADING.temperature).masked_fill(torch.eye(len(f)) > 0, -torch.inf), dim=1
    )
    repelled = (number != number[:, None]) & (number != positive[:, None])
    losses = -torch.log(probability[number, positive])
    losses = losses - (torch.log(1 - probability) * repelled).sum(dim=1)
    (losses.sum() / (2 * GLOBAL_BATCH)).backward()
    parameters = [parameter.detach() - RATE * parameter.grad for parameter in network.parameters()]
    bank = trainer.bank.rows.double()
    mean = f.detach().view(2, -1, DIM).mean(dim=0)
    bank[ids] = F.normalize(0.5 * bank[ids] + 0.5 * mean, dim=1)
    similarity = (f @ f.T).detach()
    means = {
        "loss": losses.mean(),
        "positive_similarity": similarity[number, positive].mean(),
        "negative_similarity": similarity[repelled].mean(),
        "embedding_norm": outputs.norm(dim=1).mean(),
    }
    return parameters, bank, {name: float(value.detach()) for name, value in means.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_makes_the_same_step_of_two_views(world_size: int) -> None:
    parameters, bank, expected_means = expected_step_of_two_views()
    ranks = run_ranks(world_size, one_step_of_two_views)
    for rank_parameters, _, means in ranks:
        for actual, expected in zip(rank_parameters, parameters, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
        assert {name: means[name] for name in expected_means} == pytest.approx(expected_means, rel=1e-5)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]).double(), bank, rtol=0, atol=1e-6)


def one_parametric_step(rank: int, world_size: int, accumulation: int) -> tuple[list[Tensor], Tensor]:
    trainer = make_trainer(rank, world_size, objective=PARAMETRIC, accumulation=accumulation)
    take_step(trainer, *my_part(rank, world_size), learning_rate=RATE)
    parameters = [parameter.detach() for parameter in trainer.embedder.parameters()]
    return parameters, trainer.objective.tables()["weights"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_ranks_trains_the_weights_of_instances_alike(
    world_size: int, accumulation: int
) -> None:
    trainer = make_trainer(0, 1, objective=PARAMETRIC)
    network, (images, ids) = trainer.embedder.backbone.double(), global_batch()
    weights = trainer.bank.rows.double().requires_grad_()
    logits = F.normalize(network(images.double()), dim=1) @ weights.T / PARAMETRIC.temperature
    (F.cross_entropy(logits, ids, reduction="sum", ignore_index=-1) / GLOBAL_BATCH).backward()
    ranks = run_ranks(world_size, one_parametric_step, accumulation)
    for rank_parameters, _ in ranks:
        for actual, parameter in zip(rank_parameters, network.parameters(), strict=True):
            expected = parameter.detach() - RATE * parameter.grad
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
    trained = torch.cat([rank[1] for rank in ranks]).double()
    torch.testing.assert_close(trained, weights.detach() - RATE * weights.grad, rtol=1e-4, atol=1e-6)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step changes."""
    momentum = {
        f"momentum {number}": trainer.optimizer.state[parameter]["momentum_buffer"]
        for number, parameter in enumerate(trainer.optimizer.parameters())
    }
    objective = trainer.objective.tables() | trainer.objective.numbers()
    state = trainer.embedder.state_dict() | momentum | objective | {"bank": trainer.bank.rows}
    return {name: value.detach().clone() for name, value in state.items()}


def assert_unchanged(trainer: Trainer, before: dict[str, Tensor]) -> None:
    changed = [name for name, value in everything(trainer).items() if not torch.equal(value, before[name])]
    assert not changed


def broken_step(rank: int, world_size: int, broken_rank: int, objective: ObjectiveConfig) -> None:
    """A step in which one rank's images are not finite, between good ones, all launched before any is read."""
    trainer = make_trainer(rank, world_size, name="resnet8", objective=objective, momentum=0.9)
    images, ids = my_part(rank, world_size)
    images = torch.cat([images, images.flip(-1)])[: objective.views]
    trainer.step(images, trainer.announce(ids), RATE)
    before = everything(trainer)
    broken = images.clone()
    if rank == broken_rank:
        broken[:, 1] = torch.nan
    trainer.step(broken, trainer.announce(ids), RATE)
    trainer.step(images, trainer.announce(ids), RATE)
    assert (trainer.steps, trainer.unread) == (3, 3)
    report = trainer.read()
    assert report.step == 1
    assert report.numbers == trainer.objective.state_dict()
    # Of two views each image is compared with those of all ranks.
    ranks = "0, 1" if objective == SPREADING and world_size == 2 else broken_rank
    with pytest.raises(NonFiniteError, match=f"not finite on rank {ranks} of {world_size}"):
        trainer.read()
    assert (trainer.steps, trainer.unread) == (1, 0)
    assert_unchanged(trainer, before)


@pytest.mark.parametrize("world_size", [1, 2])
def test_from_numbers_that_are_not_finite_on_nothing_changes(world_size: int) -> None:
    for objective in (NCE, PARAMETRIC, SPREADING, SoftmaxConfig(), InfoNCEConfig(num_negatives=9)):
        run_ranks(world_size, broken_step, world_size - 1, objective)


def test_a_first_step_that_is_not_finite_changes_nothing() -> None:
    trainer = make_trainer(0, 1, name="resnet8", momentum=0.9)
    before = everything(trainer)
    images, ids = my_part(0, 1)
    with pytest.raises(NonFiniteError):
        take_step(trainer, images * torch.inf, ids, RATE)
    assert trainer.steps == 0
    assert_unchanged(trainer, before)


def test_outputs_too_long_to_be_normalized_change_nothing() -> None:
    trainer = make_trainer(0, 1)
    with torch.no_grad():
        trainer.embedder.backbone[-1].weight.mul_(1e30)
    rows = trainer.bank.rows.clone()
    with pytest.raises(NonFiniteError, match="not finite on rank 0"):
        take_step(trainer, *my_part(0, 1), learning_rate=RATE)
    assert torch.equal(rows, trainer.bank.rows)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    trainer = make_trainer(0, 1, momentum=0.9)
    before = everything(trainer)
    first = next(iter(trainer.embedder.parameters()))
    first.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        take_step(trainer, *my_part(0, 1), learning_rate=RATE)
    assert_unchanged(trainer, before)


def test_steps_that_are_read_later_are_the_same_steps() -> None:
    at_once, later = (make_trainer(0, 1, name="resnet8", momentum=0.9) for _ in range(2))
    images, ids = my_part(0, 1)
    means = []
    for _ in range(3):
        means.append(take_step(at_once, images, ids, RATE))
        later.step(images, later.announce(ids), RATE)
    assert [later.read().means for _ in range(3)] == means
    assert_unchanged(later, everything(at_once))


def negative_seeds(rank: int, world_size: int) -> list[int]:
    trainer, seeds = make_trainer(rank, world_size), []
    for _ in range(3):
        take_step(trainer, *my_part(rank, world_size), learning_rate=0.0)
        seeds.append(trainer._generator.initial_seed())
    return seeds


def test_every_rank_and_step_draws_its_own_negatives() -> None:
    seeds = [seed for rank in run_ranks(2, negative_seeds) for seed in rank]
    assert len(set(seeds)) == 6


def several_steps(rank: int, world_size: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    trainer = make_trainer(rank, world_size, name="resnet8")
    images, ids = my_part(rank, world_size)
    for _ in range(steps):
        take_step(trainer, images + rank, ids, learning_rate=0.03)
    local = trainer.embedder.backbone.bn1.running_mean.clone()
    with trainer.buffers.averaged():
        averaged = trainer.embedder.backbone.bn1.running_mean.clone()
    assert torch.equal(trainer.embedder.backbone.bn1.running_mean, local)
    return local, averaged, trainer.bank.rows


def test_statistics_are_averaged_over_the_ranks() -> None:
    (first, averaged, _), (second, same, _) = run_ranks(2, several_steps, 1)
    assert not torch.equal(first, second)
    torch.testing.assert_close(averaged, (first + second) / 2)
    assert torch.equal(averaged, same)


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (several_steps(0, 1, 3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_any_image_changes_no_row() -> None:
    trainer = make_trainer(0, 1)
    before = trainer.bank.rows.clone()
    images, ids = my_part(0, 1)
    assert take_step(trainer, images, torch.full_like(ids, -1), learning_rate=RATE) == {}
    assert torch.equal(trainer.bank.rows, before)


def test_training_lowers_the_loss() -> None:
    trainer = make_trainer(0, 1)
    images, ids = my_part(0, 1)
    losses = [take_step(trainer, images, ids, learning_rate=0.3)["loss"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize(("world_size", "accumulation"), [(5, 1), (2, 4)])
def test_batches_that_cannot_be_shared_are_refused(world_size: int, accumulation: int) -> None:
    with pytest.raises(ConfigError, match=r"batch of 12 .* multiple of"):
        make_trainer(0, world_size, accumulation=accumulation)


def test_float32_means_float32_and_leaves_torch_able_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has an old and a new flag for TF32; where they are mixed, `torch.export` and `torch.compile` raise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make_trainer(0, 1)
    assert not torch.backends.cudnn.allow_tf32


def test_more_workers_than_rows_are_refused() -> None:
    worker = Worker(0, 64, 0, 64, 0, torch.device("cpu"))
    config = RunConfig(data=DataConfig(path="unused"), training=TrainingConfig(batch_size=64))
    with pytest.raises(ConfigError, match="use at most"):
        Trainer(worker, config, 63)


def test_a_bank_that_does_not_fit_is_refused_before_it_is_made() -> None:
    worker = Worker(0, 1, 0, 2, 0, torch.device("cpu"))
    config = RunConfig(data=DataConfig(path="unused"), backbone=BackboneConfig(name="resnet8"))
    with pytest.raises(
        ConfigError, match=r"1,000,000,000 rows of a rank.*need 1024.0 GB and .* are free.*rows fit here"
    ):
        Trainer(worker, config, 10**9)


def test_one_image_cannot_be_told_apart_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.instdisc.training.test_trainer.GLOBAL_BATCH", 1)
    with pytest.raises(ValueError, match=r"--training\.batch-size to 2 or more"):
        make_trainer(0, 1, objective=SPREADING)


def test_a_batch_that_is_told_apart_is_not_cut_into_parts() -> None:
    training = TrainingConfig(batch_size=12, accumulation=2)
    with pytest.raises(ValueError, match=r"spreading compares.*2 parts.*accumulation at 1"):
        RunConfig(data=DataConfig(path="unused"), objective=SpreadingConfig(), training=training)


def test_the_loader_must_give_as_many_views_as_the_objective_compares() -> None:
    images, ids = my_part(0, 1)
    with pytest.raises(ConfigError, match=r"nce compares 1 view.*the loader gives 2.*views=1"):
        take_step(make_trainer(0, 1), images.repeat(2, 1, 1, 1, 1), ids, learning_rate=RATE)


def step_with_stderr(rank: int, world_size: int, directory: Path) -> None:
    with (directory / str(rank)).open("w") as file:
        os.dup2(file.fileno(), 2)  # C++ writes there, past `sys.stderr`
    one_step(rank, world_size, {})
    os.write(2, b"the end")


def test_ranks_print_no_warning_of_ddp(tmp_path: Path) -> None:
    run_ranks(2, step_with_stderr, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["the end"] * 2
