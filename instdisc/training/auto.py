"""What `python -m instdisc.train auto` chooses, and why: from the images, this machine and the minutes given."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision

from cluster.group import Worker
from instdisc.model.backbone import check_backbone
from instdisc.settings.auto import MODEL_RECIPE, AutoConfig, plain
from instdisc.settings.model import InitConfig
from instdisc.settings.recipes import RECIPES
from instdisc.settings.run import RunConfig
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order

_SMALL_SIDE = 48
"""Images whose shorter side has up to this many pixels are seen at 32."""
_TRIAL_SECONDS = 5.0
_MOST_EPOCHS = 1000
_SHARE_OF_TRAINING = 0.85
"""Of the time; the rest is for starting and measuring."""
_EPOCHS_FOR_MORE_LAYERS = 100
_MANY_IMAGES = 20_000


@dataclass(frozen=True)
class Choice:
    """Settings, and the reason for each.

    Attributes:
        config: Settings.
        reasons: What was chosen and why, by what it is about.
    """

    config: RunConfig
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(f"  {name:<10}{text}" for name, text in self.reasons.items())


def choose(config: AutoConfig, images: Manifest, given: Callable[[RunConfig], RunConfig]) -> Choice:
    """Choose what decides quality and time; times a few steps of training in this process for it.

    Args:
        config: Data, time, and how the run is carried out.
        images: The training images.
        given: Sets the options that the user gave, which are kept, in settings that were chosen.

    Raises:
        ConfigError: The options given do not fit each other.
    """
    side = int(np.median(np.minimum(images.heights, images.widths)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    machine = f"{gpus} GPU(s)" if gpus else f"{os.cpu_count()} CPUs, no GPU"
    labels = f"{len(images.class_names)} classes for kNN accuracy" if images.has_labels else "no labels"
    batch = _batch_size(len(images), gpus)
    base = RECIPES[MODEL_RECIPE].config
    chosen = dataclasses.replace(
        plain(config),
        objective=base.objective,
        optimizer=dataclasses.replace(
            base.optimizer, learning_rate=base.optimizer.learning_rate * batch / base.training.batch_size
        ),
        training=dataclasses.replace(config.training, batch_size=batch),
    )
    chosen, why = _with_network(chosen, images, side, gpus)
    trial = given(chosen)
    check_backbone(trial.backbone, trial.augmentation.image_size)
    speed = images_per_second(trial, images) * max(1, gpus)
    if trial.backbone.name == "resnet8" and _epochs(speed, config, images) >= _EPOCHS_FOR_MORE_LAYERS:
        deeper = dataclasses.replace(chosen, backbone=dataclasses.replace(chosen.backbone, name="resnet20"))
        slower = images_per_second(given(deeper), images)
        if _epochs(slower, config, images) >= _EPOCHS_FOR_MORE_LAYERS:
            chosen, speed = deeper, slower
            why += f", and time for {_EPOCHS_FOR_MORE_LAYERS} epochs with 20 layers"
    chosen = given(_with_length(chosen, _epochs(speed, config, images)))
    name, epochs, weights = chosen.backbone.name, chosen.training.epochs, chosen.init.weights
    reasons = {
        "images": f"{len(images):,}, shorter side {side} pixels (median), {labels}",
        "machine": f"{machine}, {config.minutes:g} min",
        "network": f"{name} at {chosen.augmentation.image_size} pixels: {why}",
        "start": f"weights of {weights}" if weights else f"random: no weights of {name} at hand",
        "objective": "two views told apart within the batch: learns fastest from few images and epochs",
        "batch": f"{chosen.training.batch_size}, learning rate {chosen.optimizer.learning_rate:g} in proportion",
        "epochs": f"{epochs}: {speed:,.0f} images/s measured"
        + (", more would not help" if epochs == _MOST_EPOCHS else ""),
    }
    return Choice(chosen, reasons)


def _batch_size(num_images: int, gpus: int) -> int:
    """As in the recipes, but at least four batches in an epoch; a power of two, so that it can be shared."""
    most = 256 * gpus if gpus else 128
    return max(2, min(most, 1 << max(num_images // 4, 1).bit_length() - 1))


def _with_network(config: RunConfig, images: Manifest, side: int, gpus: int) -> tuple[RunConfig, str]:
    """Network, sizes of the views, and start; with the reason."""
    base = RECIPES[MODEL_RECIPE].config
    small, init = side <= _SMALL_SIDE, InitConfig()
    if small and not gpus:
        name, why, augmentation = "resnet8", "small images, no GPU", base.augmentation
    elif small:
        name, why = "resnet18", "small images"
        augmentation = dataclasses.replace(base.augmentation, training_size=None)
    else:
        photographs = Augmentation(hue=base.augmentation.hue)
        many = len(images) >= _MANY_IMAGES
        name = "resnet50" if gpus and many else "resnet18"
        at_hand = _weights_at_hand(name)
        if at_hand:
            init = InitConfig(weights="torchvision")
        if gpus:
            size, why = (224, "many photographs") if many else (128, "few photographs")
            augmentation = dataclasses.replace(photographs, image_size=size)
        elif at_hand:
            why = "its weights are at hand; no GPU for larger ones"
            augmentation = dataclasses.replace(photographs, image_size=96)
        else:
            name, why = "resnet8", "no GPU, so photographs are reduced"
            augmentation = dataclasses.replace(photographs, image_size=64, training_size=48)
    backbone = dataclasses.replace(config.backbone, name=name)
    return dataclasses.replace(config, backbone=backbone, augmentation=augmentation, init=init), why


def _weights_at_hand(name: str) -> bool:
    """Whether torchvision's weights of a network have been downloaded."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).exists()


def _epochs(speed: float, config: AutoConfig, images: Manifest) -> int:
    seconds = 60 * config.minutes * _SHARE_OF_TRAINING
    return max(1, min(_MOST_EPOCHS, math.floor(seconds * speed / len(images))))


def _with_length(config: RunConfig, epochs: int) -> RunConfig:
    """A number of epochs, with a warm-up and measurements in proportion."""
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, epochs=epochs),
        optimizer=dataclasses.replace(config.optimizer, warmup_epochs=round(min(3.0, 0.06 * epochs), 2)),
        knn=dataclasses.replace(config.knn, every=max(1, epochs // 5)),
    )


def images_per_second(config: RunConfig, images: Manifest) -> float:
    """The speed of training in this process, over a few seconds, with the loader and the objective."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    batch = config.training.batch_size
    trainer = Trainer(Worker(0, 1, 0, 1, 0, device), config, len(images))
    order = Order(num_instances=len(images), global_batch=batch, seed=config.training.seed)
    with open_loader(
        images,
        order.requests(),
        augmentation=config.augmentation,
        training=True,
        views=config.objective.views,
        seed=config.training.seed,
        device=device,
        config=config.loader,
        watches_contrast=False,  # training tells of them
    ) as loader:

        def step() -> None:
            got = next(loader)
            trainer.step(got.images, trainer.announce(got.instance_ids), learning_rate=1e-6)
            trainer.read()

        step()  # which starts the loader and chooses kernels
        started, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - started < _TRIAL_SECONDS:
            step()
            steps += 1
        return steps * batch / (time.perf_counter() - started)
