"""Steps of every objective on a pretended GPU: no devices are mixed, and the host waits once, to read the means."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)

READ = "tolist at instdisc/training/trainer.py: *totals, gradient_norm ="
CASES: list[tuple[ObjectiveConfig, dict[str, Any]]] = [
    (NCEConfig(num_negatives=64), {}),
    (NCEConfig(num_negatives=64), {"dtype": "bfloat16"}),
    (NCEConfig(num_negatives=64), {"parts": 4}),
    (SoftmaxConfig(), {}),
    (SoftmaxConfig(), {"dtype": "float16", "flash": True}),
    (SoftmaxConfig(), {"fused": False}),
    (InfoNCEConfig(num_negatives=512), {}),
    (InfoNCEConfig(num_negatives=512), {"dtype": "bfloat16", "parts": 2}),
    (InfoNCEConfig(num_negatives=512, shared_negatives=False), {}),
    (ParametricSoftmaxConfig(), {}),
    (ParametricSoftmaxConfig(), {"parts": 2}),
    (SpreadingConfig(), {}),
    (SpreadingConfig(form="paper", key_gradient=True), {"dtype": "float16"}),
]


@pytest.fixture(scope="module")
def pretending() -> Iterator[ProcessPoolExecutor]:
    """A process whose PyTorch pretends to have a GPU."""
    from tests import pretend_gpu

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=pretend_gpu.begin) as pool:
        yield pool


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize(("objective", "options"), CASES, ids=lambda case: getattr(case, "name", str(case)))
def test_a_step_waits_once(
    pretending: ProcessPoolExecutor, objective: ObjectiveConfig, options: dict[str, Any], world_size: int
) -> None:
    waits = pretending.submit(waits_of_a_step, objective, world_size, **options).result()
    assert list(waits.values()) == [1], waits
    assert next(iter(waits)).startswith(READ)


def test_a_wait_and_a_mixture_are_seen(pretending: ProcessPoolExecutor) -> None:
    waits, error = pretending.submit(careless).result()
    assert len(waits) == 5
    assert "mixed" in error


def careless() -> tuple[list[str], str]:
    """What must not go unseen."""
    import torch

    from tests import pretend_gpu

    pretend_gpu.waits.clear()
    with pretend_gpu.PretendGpu():
        numbers = torch.arange(4, device="cuda")
        numbers[numbers > 2]
        numbers.unique()
        numbers.cpu()
        float(numbers[0])
        torch.zeros(4).to("cuda")
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True)  # alone does not wait
        error = ""
        try:
            numbers + torch.zeros(4)
        except RuntimeError as mixed:
            error = str(mixed)
    return [name.partition(" at ")[0] for name in pretend_gpu.waits], error


def waits_of_a_step(
    objective: ObjectiveConfig,
    world_size: int,
    *,
    dtype: str = "float32",
    parts: int = 1,
    flash: bool = False,
    fused: bool = True,
) -> dict[str, int]:
    """The waits of the second step of a trainer, whose network is passed over."""
    import torch
    from torch import nn

    from cluster.group import Worker
    from instdisc.model import backbone
    from instdisc.objectives import attention, nce
    from instdisc.settings.model import BackboneConfig, BankConfig
    from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
    from instdisc.training import trainer as training
    from pipelines.augment import Augmentation
    from tests import pretend_gpu

    attention.can_use_flash_attention = lambda asked: fused and flash
    attention.can_use_efficient_attention = lambda asked: fused
    nce.gpu_kernel = lambda: None  # PyTorch's operations: a kernel of Triton's cannot be pretended
    dim, batch, rows = 16, 32, 4000
    backbone.CIFAR_RESNETS["tiny"] = lambda outputs: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs)
    )
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    config = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=8),
        backbone=BackboneConfig(name="tiny", embedding_dim=dim),
        objective=objective,
        bank=BankConfig(dtype=dtype),  # type: ignore[arg-type]
        training=TrainingConfig(batch_size=batch, accumulation=parts),
    )
    training._wrap = lambda embedder, config, worker: embedder
    with pretend_gpu.PretendGpu():
        worker = Worker(0, world_size, 0, min(world_size, 8), 0, torch.device("cuda", 0))
        trainer = training.Trainer(worker, config, rows)

        def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Embeddings whose gradient nobody asks for: autograd's own threads know nothing of pretence."""
            assert images.is_contiguous(memory_format=torch.channels_last)
            outputs = torch.randn(len(images), dim, device="cuda")
            return nn.functional.normalize(outputs, dim=1), outputs.norm(dim=1)

        network.train = lambda: None  # type: ignore[attr-defined]
        trainer._network = network
        trainer.optimizer.zero_grad = lambda set_to_none: None
        for parameter in trainer.embedder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pretend_gpu.OnGpu.backward = lambda self, gradient: None
        local, views = batch // world_size, objective.views
        images = torch.zeros(views, local, 8, 8, 3, device="cuda").permute(0, 1, 4, 2, 3)
        for ids in torch.randperm(rows)[: 2 * local].split(local):
            pretend_gpu.waits.clear()
            trainer.step(images, ids, 0.1)
            trainer.phases.finish_step()
    return dict(pretend_gpu.waits)
