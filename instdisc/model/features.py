"""What the network computes on the way: features of every stage, pooled to a bounded size."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instdisc.model.backbone import Embedder

FEATURES, EMBEDDINGS = "features", "embeddings"
_READ_OUT_DIMS = 512
_MOST_CONVOLUTIONS = 5  # AlexNet's: every one is a stage
_POOLINGS = (nn.MaxPool2d, nn.Identity)  # small images have an identity where the first pooling was


class Stage(NamedTuple):
    """Where to look: at what a module is given, or at what it returns."""

    module: nn.Module
    its_input: bool


def stages(backbone: nn.Module) -> dict[str, Stage]:
    """The stages of a network by name, in their order.

    ResNets and their kin have conv1 (stem) and layer1, layer2, …; AlexNet has conv1 to conv5, VGG one for what goes
    into each pooling. Other networks have none but `features`, what the head is given, which all networks have.

    Args:
        backbone: The network; its last module is the head.
    """
    found: dict[str, Stage] = {}
    children = dict(backbone.named_children())
    layers = {
        name: child for name, child in children.items() if name.startswith("layer") and name[5:].isdigit()
    }
    if layers:
        found["conv1"] = Stage(next(iter(layers.values())), its_input=True)
        found |= {name: Stage(child, its_input=False) for name, child in layers.items()}
    elif isinstance(children.get("features"), nn.Sequential):
        parts = list(children["features"])  # type: ignore[call-overload]
        ends = [Stage(part, its_input=False) for part in parts if isinstance(part, nn.ReLU)]
        if len(ends) > _MOST_CONVOLUTIONS:
            ends = [Stage(part, its_input=True) for part in parts if isinstance(part, _POOLINGS)]
        found = {f"conv{number}": end for number, end in enumerate(ends, 1)}
    return found | {FEATURES: Stage(list(backbone.modules())[-1], its_input=True)}


def stage_names(backbone: nn.Module) -> tuple[str, ...]:
    """What `stage_features` can compute, from the pixels to the embedding."""
    return (*stages(backbone), EMBEDDINGS)


@torch.no_grad()
def stage_features(network: Embedder, images: Tensor, *, stage: str, max_dims: int) -> Tensor:
    """Features of one stage; with the stage bound by `functools.partial`, an `ImageFunction`.

    Args:
        network: In evaluation mode.
        images: Normalized, (B, 3, H, W).
        stage: One of `stage_names`.
        max_dims: Larger maps are averaged down to the largest square grid that keeps within this many entries.

    Returns:
        float32 (B, D_stage).
    """
    if stage == EMBEDDINGS:
        return network(images)  # type: ignore[no-any-return]
    module, its_input = stages(network.backbone)[stage]
    found: list[Tensor] = []

    def keep(value: Tensor) -> None:
        found.append(pooled(value, max_dims))  # at once: a later layer may overwrite it in place

    handle = (
        module.register_forward_pre_hook(lambda _, given: keep(given[0]))
        if its_input
        else module.register_forward_hook(lambda _, __, result: keep(result))
    )
    with handle:
        network(images)
    (features,) = found
    return features


@torch.no_grad()
def stage_means(network: Embedder, images: Tensor) -> list[Tensor]:
    """The mean of every channel after each stage, from the first on; `features` alone where there are no others.

    Args:
        network: In evaluation mode.
        images: Normalized, (B, 3, H, W).

    Returns:
        float32 (B, C_stage) for each stage.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = pooled(value, value.shape[1])

    chosen = stages(network.backbone)
    if len(chosen) > 1:
        chosen.pop(FEATURES)  # those of the last stage
    with contextlib.ExitStack() as hooks:
        for name, (module, its_input) in chosen.items():
            hooks.enter_context(
                module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
                if its_input
                else module.register_forward_hook(lambda _, __, result, name=name: keep(name, result))
            )
        network(images)
    return [found[name] for name in chosen]


def mirrored_features(network: Embedder, images: Tensor) -> Tensor:
    """What the last stage sees in images and in their mirror images, an `ImageFunction`: the read-out `features`.

    Args:
        network: In evaluation mode.
        images: Normalized, (B, 3, H, W).

    Returns:
        float32 (B, F), the sum of two unit vectors, with F at most 512 where the stage has no more channels.
    """
    names = list(stages(network.backbone))
    stage = names[-2] if len(names) > 1 else FEATURES  # what goes into the last pooling
    both = (
        stage_features(network, each, stage=stage, max_dims=_READ_OUT_DIMS)
        for each in (images, images.flip(3))
    )
    return torch.stack([F.normalize(each, dim=1) for each in both]).sum(dim=0)


def pooled(maps: Tensor, max_dims: int) -> Tensor:
    """Feature maps as vectors of at most `max_dims` entries.

    Args:
        maps: (B, C, H, W), averaged to (B, C, s, s) if larger; anything else is flattened as it is.
        max_dims: Bound for C·s²; s is at least 1.

    Returns:
        float32 (B, C·s²), a copy.
    """
    if maps.ndim == 4:
        side = max(1, math.isqrt(max_dims // maps.shape[1]))
        if maps.shape[2] > side or maps.shape[3] > side:
            maps = F.adaptive_avg_pool2d(maps, (min(side, maps.shape[2]), min(side, maps.shape[3])))
    return maps.flatten(1).to(torch.float32, copy=True)
