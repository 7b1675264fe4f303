"""Settings of the network and of the bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The network from pixels to embeddings."""

    name: str = "resnet50"
    """A torchvision classification network (resnet18, resnet50, alexnet, vgg16_bn, googlenet, …), or resnet8, resnet20,
    resnet32: the CIFAR ResNets of He et al. 2016 with 16, 32 and 64 channels."""
    embedding_dim: int = 128
    """D, entries of an embedding."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 2:
            raise ValueError(f"embedding_dim is {self.embedding_dim}, it must be at least 2: 128 is usual")


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The memory bank."""

    momentum: float = 0.5
    """Weight of the old row in an update, 0 to below 1; 0 replaces the row, as in Wu et al. 2018, 0.5 is their public
    code."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the rows and of the queries sent to them; half precision halves the memory of the bank."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"bank momentum is {self.momentum}, it must be in [0, 1): 0.5 is usual")
