"""How fast a GPU is: parts of `benchmarks/gpu.py`."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import objectives as peers
from benchmarks.gpu_checks import CIFAR_MEAN, CIFAR_STD, Row, Setting, compared, pictures, trainer_of
from instdisc.model.bank import random_unit_rows
from instdisc.model.voters import choose_voters
from instdisc.model.votes import Accuracy, count_hits, shard_top_k
from instdisc.settings.objectives import (
    NCEConfig,
    SpreadingConfig,
)
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.training.optim import learning_rate
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.loader import LoaderConfig, open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order, Request


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
