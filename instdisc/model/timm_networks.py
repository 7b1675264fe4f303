"""Networks of timm: pooled features with a linear head on top. timm is an extra and imported only where it is used."""

from __future__ import annotations

import difflib
import importlib.util
from collections import OrderedDict
from typing import Any

from torch import nn

from instdisc.common.errors import ConfigError
from instdisc.settings.model import TIMM

BODY = "body."
"""Begins the names of a network's weights that are timm's own; the rest are the head's."""


def timm_backbone(name: str, image_size: int, embedding_dim: int) -> nn.Module:
    """A network of timm with random weights and a linear head.

    Args:
        name: As timm has it, with `timm:` before it.
        image_size: Side of the square images in pixels; vision transformers are built for it.
        embedding_dim: D, outputs of the head.

    Raises:
        ConfigError: timm is missing, has no such network, or cannot build it for images of this size.
    """
    body = timm_body(name, image_size, pretrained=False)
    return nn.Sequential(OrderedDict(body=body, embedding=nn.Linear(body.head_hidden_size, embedding_dim)))


def timm_body(name: str, image_size: int, *, pretrained: bool) -> Any:
    """The network without its classifier: images to pooled features; see `timm_backbone`.

    Args:
        name: With `timm:` before it.
        image_size: In pixels.
        pretrained: With timm's weights, from its cache or downloaded.

    Raises:
        ConfigError: See `timm_backbone`; or there are no weights, or they could not be downloaded.
    """
    options: dict[str, Any] = {"img_size": image_size} if _settings(name).fixed_input_size else {}
    own = name.removeprefix(TIMM)
    import timm

    try:
        return timm.create_model(own, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # of the network, or of whatever library downloads
        if pretrained:
            raise ConfigError(
                f"the weights of {name} could not be read ({_first_line(error)}): download them where there is a "
                "network, and give the file as --init.weights with --backbone.name"
            ) from error
        raise ConfigError(
            f"backbone {name} cannot be built for images of {image_size} pixels ({_first_line(error)}): change "
            "--augmentation.image-size or --backbone.name"
        ) from error


def check_has_weights(name: str) -> None:
    """Refuse a network for which timm has no weights.

    Raises:
        ConfigError: It has none, or `timm_backbone` would raise.
    """
    if not _settings(name).has_weights:
        raise ConfigError(
            f"timm has no weights for {name}: use another name, or --backbone.name {name} for random ones"
        )


def classifier_of(name: str) -> tuple[str, ...]:
    """The names of the layers that are timm's classifier of this network."""
    classifier = _settings(name).classifier
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def normalization_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that timm's weights were trained with."""
    settings = _settings(name)
    return tuple(settings.mean), tuple(settings.std)


def _settings(name: str) -> Any:
    """What timm knows of a network.

    Raises:
        ConfigError: timm is missing, or knows no such network; names similar ones.
    """
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(f"{name} needs the package timm, which is not here: pip install 'instdisc[timm]'")
    import timm

    own = name.removeprefix(TIMM)
    architecture, _, tag = own.partition(".")
    known = timm.list_models()
    if architecture in known:
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        if not tag or own in tagged:
            return timm.get_pretrained_cfg(own)
        raise ConfigError(
            f"timm has no weights {own!r}: of {architecture} it has {', '.join(tagged) or 'none'}"
        )
    close = difflib.get_close_matches(architecture, known, n=3)
    hint = f"did you mean {', '.join(TIMM + each for each in close)}?" if close else "see timm.list_models()"
    raise ConfigError(f"timm has no network {own!r}: {hint}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
