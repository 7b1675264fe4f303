"""Settings of the network and of the bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cluster.ranges import Range, Ranged


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Ranged):
    """The network from pixels to embeddings."""

    name: str = "resnet50"
    """A torchvision classification network (resnet18, resnet50, alexnet, vgg16_bn, googlenet, …), or resnet8, resnet20,
    resnet32: the CIFAR ResNets of He et al. 2016 with 16, 32 and 64 channels."""
    embedding_dim: Annotated[int, Range(at_least=2, usual="128")] = 128
    """D, entries of an embedding."""


@dataclass(frozen=True, kw_only=True)
class BankConfig(Ranged):
    """The memory bank."""

    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.5")] = 0.5
    """Weight of the old row in an update, 0 to below 1; 0 replaces the row, as in Wu et al. 2018, 0.5 is their public
    code."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the rows and of the queries sent to them; half precision halves the memory of the bank."""
