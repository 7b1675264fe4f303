"""What is right on a GPU, and does not wait: parts of `benchmarks/gpu.py`."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks import objectives as peers
from cluster.group import Worker
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.model.votes import shard_top_k
from instdisc.objectives.attention import attend
from instdisc.objectives.nce import NCE, gpu_kernel
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
from pipelines.build import build_manifest
from pipelines.loader import LoaderConfig, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request

CONFIGS: tuple[ObjectiveConfig, ...] = (
    NCEConfig(),
    SoftmaxConfig(),
    InfoNCEConfig(),
    InfoNCEConfig(num_negatives=4096, shared_negatives=False),
    ParametricSoftmaxConfig(),
    SpreadingConfig(),
)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Row = dict[str, Any]


class Setting(NamedTuple):
    """What every part is told."""

    device: torch.device
    small: bool
    data: Path | None
    seconds: float  # that this part may take


def right(setting: Setting) -> Iterator[Row]:
    """Largest relative errors, each with what it may be at most."""
    device = setting.device
    num_rows, dim, batch = (5_000, 32, 16) if setting.small else (1_281_167, 128, 256)
    exact, queries = random_unit_rows(0, num_rows, dim, seed=0), random_unit_rows(0, batch, dim, seed=1)
    negatives = torch.randint(num_rows, (batch, 64 if setting.small else 4096))
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)):
        # The same rounded numbers, in float64 on the CPU; of the softmax no more queries than it has time for.
        rows, asking = exact.to(dtype), queries.to(dtype)
        few = asking[:16]
        out, log_sum = attend(few.to(device), rows.to(device), 0.07)
        scores = few.double() @ rows.double().T / 0.07
        yield compared(f"softmax {dtype}", log_sum, torch.logsumexp(scores, 1), allowed)
        yield compared(f"softmax gradient {dtype}", out, torch.softmax(scores, 1) @ rows.double(), allowed)
        objective = NCE(NCEConfig(), num_rows, Bank(rows.to(device)))
        terms = objective.negative_terms(asking.to(device), negatives.to(device), 1.0, rows.to(device))
        scaled = torch.einsum("gkd,gd->gk", rows[negatives[:16]].double(), few.double()) / 0.07
        logits = scaled + float(objective._logit_offset)
        gradient = torch.einsum("gk,gkd->gd", torch.sigmoid(logits) / 0.07, rows[negatives[:16]].double())
        kernel = "Triton" if device.type == "cuda" and gpu_kernel() else "PyTorch"
        yield compared(f"nce gradient {dtype}, {kernel}", terms[:16, :dim], gradient, allowed)
        yield compared(f"nce loss {dtype}, {kernel}", terms[:16, dim], F.softplus(logits).sum(1), allowed)
        found, _ = shard_top_k(few.float().to(device), rows.to(device), 50)
        expected = (few.double() @ rows.double().T).topk(50).values
        yield compared(f"kNN {dtype}", found, expected, 1e-4)
    for config in CONFIGS:
        if config.name in ("softmax", "parametric", "spreading"):  # draw nothing
            losses = [losses_of(config, each) for each in (device, torch.device("cpu"))]
            yield compared(f"losses of three steps, {config.name}", *map(torch.tensor, losses), 1e-3)


def compared(what: str, found: Tensor, expected: Tensor, allowed: float) -> Row:
    """A row of the error relative to the largest number."""
    difference = (found.detach().double().cpu() - expected.double()).abs().max()
    error = float(difference / expected.double().abs().max())
    return {"what": what, "error": error, "allowed": allowed, "ok": error <= allowed}


def losses_of(config: ObjectiveConfig, device: torch.device) -> list[float]:
    """Of three steps in float32."""
    trainer = trainer_of(device, config, 500, batch=16, network="resnet8", side=32, precision="float32")
    generator = torch.Generator().manual_seed(1)
    losses = []
    for first in (0, 16, 32):
        images = torch.randn(config.views, 16, 3, 32, 32, generator=generator).to(device)
        trainer.step(images, trainer.announce(torch.arange(first, first + 16)), 0.03)
        losses.append(trainer.read().means["loss"])
    return losses


def trainer_of(
    device: torch.device,
    config: ObjectiveConfig,
    rows: int,
    *,
    batch: int,
    network: str,
    side: int,
    **more: Any,
) -> Trainer:
    """A trainer of one rank."""
    run = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=side),
        backbone=BackboneConfig(name=network),
        objective=config,
        bank=BankConfig(),
        training=TrainingConfig(batch_size=batch, precision=more.get("precision", "auto")),
    )
    return Trainer(Worker(0, 1, 0, 1, 0, device), run, rows)


def views(setting: Setting) -> Iterator[Row]:
    """Batches of two views that were put together while the device had other work, against the CPU's."""
    count, side = (32, 32) if setting.small else (2048, 128)
    with tempfile.TemporaryDirectory() as folder:
        manifest = pictures(Path(folder), count, side)
        expected = list(batches(manifest, torch.device("cpu"), count, side, views=2))
        busy = torch.randn(
            64 if setting.small else 8192, 64 if setting.small else 8192, device=setting.device
        )
        wrong = 0
        for (images, _), (truth, _) in zip(
            batches(manifest, setting.device, count, side, views=2), expected, strict=True
        ):
            for _ in range(20):
                busy = F.normalize(busy @ busy)
            wrong += not torch.allclose(images.cpu(), truth, atol=1e-5)
        yield {"what": "batches of two views that differ", "error": wrong, "allowed": 0, "ok": not wrong}


def batches(
    manifest: Manifest, device: torch.device, count: int, side: int, views: int
) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, count // 16)
    with open_loader(
        manifest,
        [Request(0, np.arange(first, first + size)) for first in range(0, count, size)],
        augmentation=Augmentation(image_size=side),
        training=True,
        views=views,
        seed=0,
        device=device,
        config=LoaderConfig(backend="host"),
    ) as loader:
        yield from loader


def pictures(folder: Path, count: int, side: int) -> Manifest:
    """So many JPEGs that look like nothing, but compress like photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((side * 3 // 2, side * 5 // 4), Image.Resampling.BICUBIC).save(
            stream, "JPEG", quality=85
        )
        (folder / f"{number:06d}.jpg").write_bytes(stream.getvalue())
    return build_manifest(folder, show_progress=False)


def waits(setting: Setting) -> Iterator[Row]:
    """Steps in which PyTorch raises where it would wait for the GPU; only reading is allowed to."""
    steps, batch, rows = (3, 8, 500) if setting.small else (200, 256, 100_000)
    on_gpu = setting.device.type == "cuda"
    deadline = time.perf_counter() + setting.seconds
    for config in CONFIGS:
        network = "resnet8" if setting.small else "resnet18"
        trainer = trainer_of(setting.device, config, rows, batch=batch, network=network, side=32)
        images = torch.randn(config.views, batch, 3, 32, 32, device=setting.device)
        done, error = 0, ""
        try:
            for done in range(steps):
                if done and time.perf_counter() > deadline:
                    break
                if on_gpu and done > 2:  # the first steps choose kernels
                    torch.cuda.set_sync_debug_mode("error")
                trainer.step(images, trainer.announce(torch.randperm(rows)[:batch]), 0.01)
                torch.cuda.set_sync_debug_mode("default") if on_gpu else None
                if trainer.unread > 1:
                    trainer.read()
        except RuntimeError as waited:
            error = str(waited).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default") if on_gpu else None
        yield {"what": config.name, "steps": done + 1, "watched": on_gpu, "error": error, "ok": not error}


def objectives(setting: Setting) -> Iterator[Row]:
    """The table of `benchmarks/objectives.py`, with what was expected of it."""
    sizes = (5_000, 32, 16) if setting.small else (1_281_167, 128, 256)
    most = {("softmax", "bfloat16"): 1.5, ("nce", "float32"): 0.3, ("nce", "bfloat16"): 0.3}
    deadline = time.perf_counter() + setting.seconds
    for case in peers.CASES:
        if time.perf_counter() > deadline:
            yield {"what": case.name, "left_out": "no time"}
            continue
        row = dataclasses.asdict(peers.measure(case, sizes, setting.device))
        limit = most.get((row["objective"], row["dtype"]))
        timed = setting.device.type == "cuda" and limit is not None
        yield row | {"expected_ms": limit, "ok": 1e3 * row["seconds"] <= limit if timed and limit else None}
