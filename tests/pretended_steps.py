"""What a step asks of a GPU, counted on a pretended one; for a process of its own, see `tests.pretend_gpu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)

OBJECTIVES: dict[str, tuple[ObjectiveConfig, dict[str, Any]]] = {
    "nce": (NCEConfig(num_negatives=64), {}),
    "nce, 4 parts": (NCEConfig(num_negatives=64), {"parts": 4}),
    "softmax": (SoftmaxConfig(), {}),
    "infonce": (InfoNCEConfig(num_negatives=512), {}),
    "infonce, own negatives": (InfoNCEConfig(num_negatives=512, shared_negatives=False), {}),
    "parametric": (ParametricSoftmaxConfig(), {}),
    "spreading": (SpreadingConfig(), {}),
}
"""One case of each objective, by the name that tables give it."""


@dataclass(frozen=True)
class StepCounts:
    """Of one step on one rank.

    Attributes:
        waits: How often the host waited, by line, from the first launch to the last.
        waits_to_read: The same of reading what the step did, afterwards.
        launches: Operations outside the network.
        collectives: Without those of DDP, by kind.
        sent_bytes: To other ranks, without DDP's gradients.
    """

    waits: dict[str, int]
    waits_to_read: dict[str, int]
    launches: int
    collectives: dict[str, int]
    sent_bytes: int


def count_step(
    objective: ObjectiveConfig,
    world_size: int,
    *,
    dtype: str = "float32",
    parts: int = 1,
    flash: bool = False,
    fused: bool = True,
) -> StepCounts:
    """The third step of a trainer, whose network is passed over, while the second one is still to be read."""
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
            counted = pretend_gpu.launches.copy()
            outputs = torch.randn(len(images), dim, device="cuda")
            results = nn.functional.normalize(outputs, dim=1), outputs.norm(dim=1)
            pretend_gpu.launches.clear()
            pretend_gpu.launches.update(counted)
            return results

        network.train = lambda: None  # type: ignore[attr-defined]
        trainer._network = network
        trainer.optimizer.zero_grad = lambda set_to_none: None
        for parameter in trainer.embedder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pretend_gpu.OnGpu.backward = lambda self, gradient: None
        local, views = batch // world_size, objective.views
        images = torch.zeros(views, local, 8, 8, 3, device="cuda").permute(0, 1, 4, 2, 3)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        for ids in order[: 3 * local].split(local):
            pretend_gpu.forget()
            sent = trainer.exchange.sent_bytes
            trainer.step(images, trainer.announce(ids), 0.1)
            trainer.phases.finish_step()
            waits = dict(pretend_gpu.waits)
            launches, collectives = pretend_gpu.launches.total(), dict(pretend_gpu.collectives)
            pretend_gpu.forget()
            if trainer.unread > 1:
                trainer.read()
        return StepCounts(
            waits,
            dict(pretend_gpu.waits),
            launches,
            collectives,
            trainer.exchange.sent_bytes - sent,
        )


def measure(world_size: int, *, dtype: str = "float32", leave_one_out: bool = False) -> float:
    """KNN accuracy of the pixels of noise, measured while a network has averaged buffers."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from cluster.exchange import Exchange
    from cluster.phases import Phases
    from instdisc.model.backbone import build_embedder
    from instdisc.model.label_free import raw_pixels
    from instdisc.model.voters import choose_voters
    from instdisc.settings.model import BackboneConfig
    from instdisc.settings.run import KnnMonitorConfig
    from instdisc.training.buffers import Buffers
    from instdisc.training.monitor import Queries, embed_rows, knn_accuracy
    from pipelines.batch import Batch
    from tests import pretend_gpu

    device = torch.device("cuda", 0)
    with pretend_gpu.PretendGpu(), torch.no_grad():
        exchange = Exchange(0, world_size, Phases(device))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        network = build_embedder(BackboneConfig(name="resnet8", embedding_dim=16), 32).eval().to(device)
        batches = (
            Batch(torch.randn(1, 20, 3, 32, 32, device=device), torch.arange(first, first + 20))
            for first in (0, 20, 40)
        )
        buffers = Buffers(network, exchange)
        with buffers.averaged():
            (rows,), present = embed_rows(batches, 60, [raw_pixels], device)
        assert all(not isinstance(value, pretend_gpu.OnGpu) for value in buffers.statistics().values())
        assert isinstance(present, pretend_gpu.OnGpu)
        voters = choose_voters(np.arange(60) % 3, leave_one_out=leave_one_out)
        places = torch.arange(60, device=device)
        queries = Queries(F.normalize(rows, dim=1), places % 3, places if leave_one_out else None, 3)
        shard = rows.to(getattr(torch, dtype)), places
        found = knn_accuracy(exchange, KnnMonitorConfig(), voters, queries, shard)
    assert found is not None
    return found.top1
