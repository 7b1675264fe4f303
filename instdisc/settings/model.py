"""Settings of the network, of where it begins, and of the bank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from cluster.ranges import Range, Ranged

TIMM = "timm:"
"""Begins the names of networks and weights that are timm's."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Ranged):
    """The network from pixels to embeddings."""

    name: str = "resnet50"
    """A torchvision classification network (resnet18, resnet50, alexnet, vgg16_bn, googlenet, …), or resnet8, resnet20,
    resnet32: the CIFAR ResNets of He et al. 2016 with 16, 32 and 64 channels; or timm:NAME, an image network of timm
    (extra timm) with a linear head on its pooled features."""
    embedding_dim: Annotated[int, Range(at_least=2, at_most=65_536, usual="128")] = 128
    """D, entries of an embedding."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """First layers of networks of torchvision: small is a 3×3 convolution of stride 1 without max-pooling, standard
    the published ones; auto is small for images of 64 pixels or less. The papers' networks are small at 96 too."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where training begins."""

    weights: str | None = None
    """Weights to begin from instead of random ones. torchvision: its default weights of the network, or a name such as
    ResNet50_Weights.IMAGENET1K_V2. timm:NAME: weights of timm together with their network. Otherwise a safetensors file
    or a state dict, or a run or snapshot of this program, of which the network alone is taken; each here or at a URL. A
    run that resumes does not need them any more."""
    partial: bool = False
    """Accept weights of which some are missing or do not fit; those layers begin at random."""
    bank: Literal["random", "embed"] | None = None
    """What the rows of the bank are at the start: random, or the embeddings of the starting network, which cost a pass
    over the images. embed is the default with given weights, random without."""

    @property
    def embeds_bank(self) -> bool:
        """Whether the starting network fills the rows of the bank."""
        return self.bank == "embed" or (self.bank is None and self.weights is not None)

    @property
    def place(self) -> str | None:
        """The path or URL of the weights; None where they have none."""
        weights = self.weights
        known = (
            weights in (None, "torchvision") or weights.startswith(TIMM) or _TORCHVISION.fullmatch(weights)
        )
        return None if known else weights


_TORCHVISION = re.compile(r"\w+_Weights\.\w+")


@dataclass(frozen=True, kw_only=True)
class BankConfig(Ranged):
    """The memory bank."""

    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.5")] = 0.5
    """Weight of the old row in an update, 0 to below 1; 0 replaces the row, as in Wu et al. 2018, 0.5 is their public
    code."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the rows and of the queries sent to them; half precision halves the memory of the bank."""
