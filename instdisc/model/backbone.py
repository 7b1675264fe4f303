"""The network: a classifier of torchvision or timm or a CIFAR ResNet, with a head of unit length as its classifier."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from instdisc.common.errors import ConfigError
from instdisc.model.timm_networks import timm_backbone
from instdisc.settings.model import TIMM, BackboneConfig

_SMALL_IMAGE = 64


class Embedder(nn.Module):
    """Images to unit embeddings: `backbone`, whose last layer is the linear embedding head, then L2 normalisation.

    Shape: (B, 3, H, W) to float32 (B, D).
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Embed images; the normalisation is done in float32 whatever the autocast type."""
        return F.normalize(self.backbone(images).float(), dim=1)


def head_of(backbone: nn.Module) -> tuple[str, nn.Module]:
    """The last layer and its name."""
    *_, (name, head) = backbone.named_modules()
    return name, head


def build_embedder(config: BackboneConfig, image_size: int) -> Embedder:
    """Build the network, randomly initialised from torch's default generator.

    With a small stem, networks of torchvision begin with a 3×3 convolution of stride 1 without max-pooling.

    Args:
        config: Settings.
        image_size: Side of the square images in pixels.

    Raises:
        ConfigError: If the network is unknown, has no such stem, or is one of timm that cannot be had.
    """
    has_choice = config.name not in CIFAR_RESNETS and not config.name.startswith(TIMM)
    if config.stem != "auto" and not has_choice:
        raise ConfigError(
            f"backbone {config.name} has one stem only: leave --backbone.stem {config.stem} out, which is for networks "
            "of torchvision"
        )
    if config.name in CIFAR_RESNETS:
        backbone = CIFAR_RESNETS[config.name](config.embedding_dim)
    elif config.name.startswith(TIMM):
        backbone = timm_backbone(config.name, image_size, config.embedding_dim)
    else:
        backbone = _torchvision_backbone(config, image_size)
    return Embedder(backbone)


def check_backbone(config: BackboneConfig, image_size: int) -> None:
    """Refuse a network that is unknown or cannot take the images; costs next to nothing.

    Args:
        config: Settings.
        image_size: Side of the square images in pixels.

    Raises:
        ConfigError: With what to change.
    """
    try:
        with torch.device("meta"):  # shapes only
            embedder = build_embedder(config, image_size)
    except NotImplementedError:  # some networks work out their sizes with tensors
        embedder = build_embedder(config, image_size)
    device = next(embedder.parameters()).device
    try:
        with torch.no_grad():
            shape = embedder.eval()(torch.empty(1, 3, image_size, image_size, device=device)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"backbone {config.name} cannot take images of {image_size} pixels ({str(error).splitlines()[0]}): "
            "change --augmentation.image-size or --backbone.name"
        ) from error
    assert shape == (1, config.embedding_dim), shape


def _torchvision_backbone(config: BackboneConfig, image_size: int) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if config.name not in known:
        close = difflib.get_close_matches(config.name, [*CIFAR_RESNETS, *known], n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"backbone.name is {config.name!r}, which is unknown: {hint}use one of {', '.join(CIFAR_RESNETS)} or a "
            f"torchvision classification network: {', '.join(known)}; or timm:NAME"
        )
    backbone: nn.Module = torchvision.models.get_model(
        config.name,
        weights=None,
        num_classes=config.embedding_dim,
        **without_auxiliary(config.name, init_weights=True),
    )
    if config.stem == "small" or (config.stem == "auto" and image_size <= _SMALL_IMAGE):
        _shrink_stem(backbone)
    _, head = head_of(backbone)
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"backbone {config.name} does not end in a linear classifier: use another --backbone.name"
        )
    if head.weight.device.type != "meta" and not head.weight.any():
        head.reset_parameters()  # vision transformers start with a head of zeros, which has no direction
    return backbone


def without_auxiliary(name: str, *, init_weights: bool = False) -> dict[str, bool]:
    """The options with which torchvision builds a network without auxiliary classifiers; none where it has none."""
    auxiliary = name in ("googlenet", "inception_v3")
    return {"aux_logits": False, "init_weights": init_weights} if auxiliary else {}


def _shrink_stem(backbone: nn.Module) -> None:
    """Make the first convolution 3×3 of stride 1 and drop a max-pooling between it and the next convolution."""
    layers = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d))
    ]
    (name, first), *rest = layers
    assert isinstance(first, nn.Conv2d)
    stem = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    backbone.set_submodule(name, stem)
    if rest and isinstance(rest[0][1], nn.MaxPool2d):
        backbone.set_submodule(rest[0][0], nn.Identity())


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (He et al. 2016, section 4.2, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs
        if self.added_channels:
            shortcut = F.pad(
                inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels)
            )
        hidden = F.relu(self.bn1(self.conv1(inputs)), inplace=True)
        return F.relu(self.bn2(self.conv2(hidden)) + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """ResNet of 6·blocks + 2 layers for small images (He et al. 2016, section 4.2).

    Shape: (B, 3, H, W) to (B, num_outputs).
    """

    def __init__(self, blocks: int, num_outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = _BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(_BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images to outputs."""
        hidden = F.relu(self.bn1(self.conv1(images)), inplace=True)
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        outputs: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return outputs


CIFAR_RESNETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": lambda num_outputs: CifarResNet(1, num_outputs),
    "resnet20": lambda num_outputs: CifarResNet(3, num_outputs),
    "resnet32": lambda num_outputs: CifarResNet(5, num_outputs),
}
