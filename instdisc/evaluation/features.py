"""What the network computes on the way: features of every stage, pooled to a bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instdisc.backbone import Embedder

MAX_DIMS = 9216
"""Entries of a stage's features after pooling; about 9,000 is what the papers' protocol keeps (Zhang et al. 2016)."""
FEATURES, EMBEDDINGS = "features", "embeddings"
_MOST_CONVOLUTIONS = 5  # AlexNet's: every one is a stage


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
    layers = {name: child for name, child in children.items() if name.removeprefix("layer").isdigit()}
    if layers:
        found["conv1"] = Stage(next(iter(layers.values())), its_input=True)
        found |= {name: Stage(child, its_input=False) for name, child in layers.items()}
    elif isinstance(children.get("features"), nn.Sequential):
        parts = list(children["features"])  # type: ignore[call-overload]
        ends = [Stage(part, its_input=False) for part in parts if isinstance(part, nn.ReLU)]
        if len(ends) > _MOST_CONVOLUTIONS:
            ends = [Stage(part, its_input=True) for part in parts if isinstance(part, nn.MaxPool2d)]
        found = {f"conv{number}": end for number, end in enumerate(ends, 1)}
    return found | {FEATURES: Stage(list(backbone.modules())[-1], its_input=True)}


class StageFeatures:
    """Computes features of all stages, and the embeddings, in one pass of a network.

    Args:
        network: Put into evaluation mode by the caller.
        max_dims: Larger maps are averaged down to the largest square grid that keeps within this many entries.
    """

    def __init__(self, network: Embedder, max_dims: int = MAX_DIMS) -> None:
        self._network, self._max_dims = network, max_dims
        self._stages = stages(network.backbone)
        self.names = (*self._stages, EMBEDDINGS)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to float32 (B, D_stage) by the name of the stage."""
        found: dict[str, Tensor] = {}
        with _watched(self._stages, found, self._max_dims):
            embeddings = self._network(images)
        return {**{name: found[name] for name in self._stages}, EMBEDDINGS: embeddings}


@contextmanager
def _watched(stages: Mapping[str, Stage], found: dict[str, Tensor], max_dims: int) -> Iterator[None]:
    """Keep what goes through the stages; pooled at once, since a later layer may overwrite it in place."""

    def keep(name: str, value: Tensor) -> None:
        found[name] = pooled(value, max_dims)

    handles = []
    for name, (module, its_input) in stages.items():
        if its_input:
            handles.append(
                module.register_forward_pre_hook(lambda _module, given, name=name: keep(name, given[0]))
            )
        else:
            handles.append(
                module.register_forward_hook(lambda _module, _given, result, name=name: keep(name, result))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
