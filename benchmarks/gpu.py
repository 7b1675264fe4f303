"""What a GPU must show, in one command of at most nine minutes: is it right, does it wait, how fast is it.

    python -m benchmarks.gpu [PART …] [--data DIR] [--device cpu --small] [--json FILE]

Each part prints its rows, and ends by itself when its share of `--minutes` is spent:

    right       objectives, kernels, kNN and the loader against float64 and the CPU
    views       batches of two views under a busy stream, against those of the CPU
    waits       200 steps of every objective in which a wait for the GPU is an error
    objectives  every objective at n = 1,281,167 beside the formulation of public code
    steps       ResNet-50 at 224 pixels with the bank and without, images/s, shares of exchange and idle GPU
    images      the same from JPEGs: the share of waiting for the loader
    knn         50,000 queries against 1,281,167 rows, k = 200, beside torch's product and topk, and faiss where it is
    cifar10     ResNet-18, two views, as many epochs as fit: seconds and kNN accuracy of an epoch (needs --data)

It needs torch, torchvision, numpy, Pillow and pyarrow alone: neither Ray, DALI, Zarr nor a command-line library. So the
loader is that of Pillow; whether DALI's memory is reused too early stays unproven here, as does all that needs two
GPUs. `--data` names a folder of tar files, such as `benchmarks/cut.py` makes of CIFAR-10.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from instdisc.model.voters import choose_voters
from instdisc.model.votes import Accuracy, count_hits, shard_top_k
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
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig
from instdisc.training.optim import learning_rate
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.loader import LoaderConfig, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order, Request

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


def steps(setting: Setting) -> Iterator[Row]:
    """Training steps on images that are there already, with the bank and without."""
    sizes = (8,) if setting.small else (32, 64, 256)
    for batch in sizes:
        images = torch.randn(1, batch, 3, *2 * (side_of(setting),), device=setting.device)
        images = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # as loaders give them
        trainer = imagenet_trainer(setting, batch)
        rows = trainer.partition.num_rows

        def with_bank(
            trainer: Trainer = trainer, images: Tensor = images, batch: int = batch, rows: int = rows
        ) -> None:
            ids = torch.randint(rows - batch, (1,)) + torch.arange(batch)
            trainer.step(images, trainer.announce(ids), 0.01)
            if trainer.unread > 1:
                trainer.read()

        def without(trainer: Trainer = trainer, images: Tensor = images) -> None:
            with trainer._autocast():
                embeddings, _ = trainer._network(images[0])
            embeddings.backward(embeddings.detach())
            trainer.optimizer.step_if(trainer._sound)
            trainer.optimizer.zero_grad(set_to_none=True)

        share = setting.seconds / (2 * len(sizes))
        bare, ours = (per_call(each, setting.device, share) for each in (without, with_bank))
        yield {
            "batch": batch,
            "images_per_second": batch / ours,
            "network_alone": batch / bare,
            "of_network": bare / ours,
            "idle_share": idle_share(with_bank, setting.device),
            **shares(trainer, with_bank, ours),
        }


def side_of(setting: Setting) -> int:
    return 32 if setting.small else 224


def imagenet_trainer(setting: Setting, batch: int, images: int = 0) -> Trainer:
    """A trainer with the rows of ImageNet, or more if there are more images."""
    rows = max(images, 500 if setting.small else 1_281_167)
    network = "resnet8" if setting.small else "resnet50"
    return trainer_of(setting.device, NCEConfig(), rows, batch=batch, network=network, side=side_of(setting))


def per_call(function: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Median seconds of a call over runs of ten, for at most so long."""
    for _ in range(2):
        function()
    times: list[float] = []
    until = time.perf_counter() + seconds
    calls = 10 if device.type == "cuda" else 1
    while len(times) < 2 or (time.perf_counter() < until and len(times) < 30):
        peers.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        peers.synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def idle_share(function: Callable[[], None], device: torch.device) -> float | None:
    """The share of the time in which no kernel runs; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    peers.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            function()
        peers.synchronize(device)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, -math.inf
    for start, stop in kernels:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - kernels[0][0]) if kernels else None


def shares(trainer: Trainer, step: Callable[[], None], seconds: float) -> Row:
    """The shares of a step's phases on the clock of the device."""
    trainer.phases.finish_step()
    spent: dict[str, list[float]] = {}
    for _ in range(12):
        step()
        for phases in trainer.phases.finish_step():
            for name, each in phases.items():
                spent.setdefault(name, []).append(each)
    return {f"{name}_share": statistics.median(values) / seconds for name, values in spent.items()}


def images(setting: Setting) -> Iterator[Row]:
    """The same steps from JPEGs: how much of the time is waiting for the loader."""
    count, batch = (64, 8) if setting.small else (4096, 256)
    with tempfile.TemporaryDirectory() as folder:
        manifest = (
            pictures(Path(folder), count, side_of(setting))
            if setting.data is None
            else build_manifest(setting.data / "train", show_progress=False)
        )
        trainer = imagenet_trainer(setting, batch, len(manifest))
        order = Order(num_instances=len(manifest), global_batch=batch, seed=0)
        waited, done, begun = 0.0, 0, 0.0
        with open_loader(
            manifest,
            order.requests(),
            augmentation=Augmentation(image_size=side_of(setting)),
            training=True,
            views=1,
            seed=0,
            device=setting.device,
            config=LoaderConfig(backend="host"),
        ) as loader:
            while done < 4 or (time.perf_counter() - begun < setting.seconds and done < 200):
                asked = time.perf_counter()
                batch_ = next(loader)
                waited += time.perf_counter() - asked
                trainer.step(batch_.images, trainer.announce(batch_.instance_ids), 0.01)
                if trainer.unread > 1:
                    trainer.read()
                done += 1
                if done == 2:  # the loader has started and kernels are chosen
                    waited, begun = 0.0, time.perf_counter()
        seconds = time.perf_counter() - begun
    yield {
        "batch": batch,
        "images_per_second": (done - 2) * batch / seconds,
        "loader_share": waited / seconds,
        "loader": "Pillow",
        "left_out": "DALI",
    }


def knn(setting: Setting) -> Iterator[Row]:
    """Exact nearest neighbors by one GPU."""
    device = setting.device
    count, num_rows, k = (64, 5_000, 20) if setting.small else (50_000, 1_281_167, 200)
    rows = random_unit_rows(0, num_rows, 128, seed=0).to(device)
    queries = random_unit_rows(0, count, 128, seed=1).to(device)
    block = min(count, 1024)

    def ours() -> list[Tensor]:
        return [shard_top_k(part, rows, k)[0] for part in queries.split(block)]

    def plain() -> list[Tensor]:
        # All scores of a block at once, as long as they fit.
        return [(part @ rows.T).topk(k).values for part in queries.split(block)]

    found: dict[str, Tensor] = {}
    for name, function in {"shard_top_k": ours, "mm, topk": plain}.items():
        start = time.perf_counter()
        found[name] = torch.cat(function())
        peers.synchronize(device)
        yield {"what": name, "queries": count, "rows": num_rows, "seconds": time.perf_counter() - start}
    yield compared("similarities of both", found["shard_top_k"], found["mm, topk"].cpu(), 1e-5)
    if importlib.util.find_spec("faiss") is None:
        yield {"what": "faiss", "left_out": "not installed"}
        return
    import faiss

    index = faiss.IndexFlatIP(128)
    index.add(rows.cpu().numpy())
    few = queries[: max(1, count // 100)].cpu().numpy()
    start = time.perf_counter()
    index.search(few, k)
    yield {
        "what": "faiss on the CPU, a hundredth",
        "queries": len(few),
        "rows": num_rows,
        "seconds": time.perf_counter() - start,
    }


def cifar10(setting: Setting) -> Iterator[Row]:
    """Train on real images for as long as there is time, and classify the test images."""
    if setting.data is None:
        yield {"left_out": "no --data"}
        return
    train, test = (build_manifest(setting.data / split, show_progress=False) for split in ("train", "test"))
    batch, planned = (250, 1) if setting.small else (256, 200)
    augmentation = Augmentation(image_size=32, hue=0.1, mean=CIFAR_MEAN, std=CIFAR_STD)
    optimizer = OptimizerConfig(learning_rate=0.03)
    network = "resnet8" if setting.small else "resnet18"
    trainer = trainer_of(
        setting.device, SpreadingConfig(key_gradient=True), len(train), batch=batch, network=network, side=32
    )
    order = Order(num_instances=len(train), global_batch=batch, seed=0)
    begun = time.perf_counter()
    seconds: list[float] = []
    # An epoch more, and measuring, must still fit.
    while (
        len(seconds) < planned and time.perf_counter() - begun + 2 * max(seconds, default=0) < setting.seconds
    ):
        start = time.perf_counter()
        with open_loader(
            train,
            order.requests(len(seconds), num_epochs=len(seconds) + 1),
            augmentation=augmentation,
            training=True,
            views=2,
            seed=0,
            device=setting.device,
            config=LoaderConfig(backend="host"),
        ) as loader:
            for images_, ids in itertools.islice(loader, 3 if setting.small else None):
                rate = learning_rate(optimizer, len(seconds), planned)
                trainer.step(images_, trainer.announce(ids), rate)
                if trainer.unread > 1:
                    trainer.read()
        loss = trainer.read().means["loss"]
        seconds.append(time.perf_counter() - start)
    accuracy = classified(trainer, train, test, augmentation, most=500 if setting.small else None)
    yield {
        "epochs": len(seconds),
        "seconds_per_epoch": statistics.median(seconds),
        "images_per_second": len(train) / statistics.median(seconds),
        "loss": loss,
        "knn_top1": accuracy and accuracy.top1,
        "k": accuracy and accuracy.k,
    }


def classified(
    trainer: Trainer, train: Manifest, test: Manifest, augmentation: Augmentation, most: int | None
) -> Accuracy | None:
    """Of the test images, by the training images; of so many of each at most."""

    def embedded(manifest: Manifest) -> Tensor:
        rows = np.arange(len(manifest))[:most]
        requests = [Request(0, each) for each in np.array_split(rows, -(-len(rows) // 500))]
        with open_loader(
            manifest,
            requests,
            augmentation=augmentation,
            training=False,
            views=1,
            seed=0,
            device=trainer.worker.device,
            config=LoaderConfig(backend="host"),
        ) as loader:
            return torch.cat([trainer.embed(batch.images[0]) for batch in loader])

    voters = choose_voters(np.asarray(train.labels)[:most], leave_one_out=False)
    k = voters.neighbors()
    rows, queries = embedded(train)[torch.from_numpy(voters.rows)], embedded(test)
    scores, places = shard_top_k(queries, rows, k)
    classes = len(train.class_names)
    truth = torch.tensor(np.asarray(test.labels)[:most], dtype=torch.int64, device=queries.device)
    hits = count_hits(scores, voters.labels_of(places), truth, classes, classes, temperature=0.07)
    return Accuracy.of(hits, k)


PARTS: dict[str, tuple[Callable[[Setting], Iterator[Row]], float]] = {
    "right": (right, 1.0),
    "views": (views, 0.5),
    "waits": (waits, 0.8),
    "objectives": (objectives, 1.5),
    "steps": (steps, 1.2),
    "images": (images, 0.7),
    "knn": (knn, 0.8),
    "cifar10": (cifar10, 2.5),
}
"""What is measured by each part, and its share of the time."""


def machine(device: torch.device) -> Row:
    """Device, driver and versions."""
    found: Row = {"torch": torch.__version__, "python": sys.version.split()[0], "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found


def shown(row: Row) -> str:
    """A row as a line of text."""
    return "  " + "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if value not in (None, "")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder with train and test, each of tar files or images")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a dry run: tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--json", type=Path, help="write all rows to this file, as they come")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; a dry run is --device cpu --small")
    device = torch.device(given.device)
    chosen = {name: PARTS[name] for name in given.parts or PARTS}
    per_share = 60 * given.minutes / sum(share for _, share in chosen.values())
    results: Row = {"machine": machine(device), "needs_two_gpus": "left out: NCCL between ranks"}
    print(shown(results["machine"]))
    failed = False
    for name, (part, share) in chosen.items():
        print(f"{name}", flush=True)
        start, rows = time.perf_counter(), results.setdefault(name, [])
        try:
            for row in part(Setting(device, given.small, given.data, share * per_share)):
                rows.append(row)
                print(shown(row), flush=True)
        except Exception as error:  # of any kind: the other parts are worth their time all the same
            rows.append({"error": f"{type(error).__name__}: {error}", "ok": False})
            print(shown(rows[-1]), flush=True)
        failed |= any(row.get("ok") is False for row in rows)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
