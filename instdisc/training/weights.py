"""The weights that training begins with: read from where they are, fitted to the network, checked."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cluster.snapshots import Snapshot, open_snapshot
from cluster.storage import Storage
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import CIFAR_RESNETS, build_embedder, head_of, without_auxiliary
from instdisc.model.fitting import fit, named
from instdisc.model.timm_networks import BODY, check_has_weights, classifier_of, normalization_of, timm_body
from instdisc.runs.network import NETWORK, network_settings
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.model import TIMM
from instdisc.settings.run import RunConfig

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


class _Found(NamedTuple):
    """Weights as they were found.

    Attributes:
        tensors: By their names there.
        normalization: Mean and standard deviation of the images that they were trained with, where that is known.
        left_out: Begin the names of those that are not wanted: the classifier's.
    """

    tensors: dict[str, Tensor]
    normalization: Normalization | None = None
    left_out: tuple[str, ...] = ()


def starting_weights(config: RunConfig) -> dict[str, Tensor] | None:
    """Read the weights that `--init.weights` names.

    Args:
        config: Settings.

    Returns:
        By the names of the backbone, each of its shape, finite, contiguous and on the CPU; without the layers that
        begin at random. None if no weights are named.

    Raises:
        ConfigError: There are none, they cannot be read safely, they are not finite, or they do not fit the network.
        SnapshotError: A snapshot cannot be read, or holds no network.
    """
    init = config.init
    if init.weights is None:
        return None
    found = _read(config)
    embedder = build_embedder(config.backbone, config.augmentation.image_size)
    try:
        fitted, how = fit(
            found.tensors,
            embedder.backbone.state_dict(),
            head=head_of(embedder.backbone)[0],
            left_out=found.left_out,
            partial=init.partial,
        )
    except ValueError as error:
        raise ConfigError(
            f"--init.weights {init.weights} do not fit {config.backbone.name}: {error}"
        ) from error
    broken = [
        name
        for name, value in fitted.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise ConfigError(
            f"--init.weights {init.weights}: {named(broken)} holds NaN or infinity: give other weights"
        )
    # What is left out was permitted, and still has to be seen.
    level = logging.WARNING if init.partial else logging.INFO
    logger.log(level, "beginning with %s: %s", init.weights, how)
    _compare_normalization(config, found.normalization)
    return fitted


def _read(config: RunConfig) -> _Found:
    weights, name = str(config.init.weights), config.backbone.name
    if config.init.place is not None:
        return _read_place(config.init.place, name)
    if not weights.startswith(TIMM):
        return _read_torchvision(weights, name)
    check_has_weights(weights)
    if not name.startswith(TIMM) or name.partition(".")[0] != weights.partition(".")[0]:
        raise ConfigError(
            f"--init.weights {weights} are for --backbone.name {weights}, and this run's is {name}: leave "
            "--backbone.name out"
        )
    body = timm_body(weights, config.augmentation.image_size, pretrained=True)
    tensors = {f"{BODY}{key}": value for key, value in body.state_dict().items()}
    return _Found(tensors, normalization_of(weights))


def _read_torchvision(weights: str, name: str) -> _Found:
    known = (
        torchvision.models.get_model_weights(name)
        if name in torchvision.models.list_models(module=torchvision.models)
        else None
    )
    if name in CIFAR_RESNETS or known is None:
        raise ConfigError(
            f"torchvision has no weights for {name}: use --backbone.name resnet18, or another of its networks"
        )
    if weights == "torchvision":
        chosen = known.DEFAULT
    else:
        kind, _, entry = weights.partition(".")
        if kind != known.__name__ or entry not in known.__members__:
            raise ConfigError(
                f"--init.weights {weights} are not weights of {name}: use torchvision, or one of "
                f"{', '.join(f'{known.__name__}.{each}' for each in known.__members__)}"
            )
        chosen = known[entry]
    try:
        tensors = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of the disk, of a damaged file
        raise ConfigError(
            f"the weights {chosen} could not be read ({error}): download {chosen.url} where there is a network, into "
            f"{Path(torch.hub.get_dir(), 'checkpoints')}"
        ) from error
    with torch.device("meta"):
        plain = torchvision.models.get_model(
            name, weights=None, **without_auxiliary(name, init_weights=False)
        )
    classifier, _ = head_of(plain)
    preset = chosen.transforms()
    normalization: Normalization = (tuple(preset.mean), tuple(preset.std))
    if without_auxiliary(name):  # torchvision's own network changes its input to this
        normalization = ((0.5,) * 3, (0.5,) * 3)
    return _Found(dict(tensors), normalization, (f"{classifier}.", "aux1.", "aux2.", "AuxLogits."))


def _read_place(place: str, name: str) -> _Found:
    """A file, a run, or a snapshot."""
    if "://" in place:
        folder, _, file = place.rpartition("/")
        if not file.endswith(_FILE_SUFFIXES):
            return _read_snapshot(open_snapshot(place), name)
        try:
            data = Storage.at(folder).read(file)
        except Exception as error:  # every file system that fsspec opens has errors of its own
            raise ConfigError(f"--init.weights {place} cannot be read ({error}): check the URL") from error
    else:
        path = Path(place)
        if not path.exists():
            raise ConfigError(
                f"--init.weights {place} does not exist: give torchvision, timm:NAME, a file, or a run or snapshot"
            )
        if path.is_dir():
            run = RunDirectory(path)
            return _read_snapshot(run.open_snapshot() if run.config.exists() else open_snapshot(path), name)
        data = path.read_bytes()
    classifier = classifier_of(name) if name.startswith(TIMM) else ()
    return _Found(_state_dict(data, place), left_out=tuple(f"{each}." for each in classifier))


def _read_snapshot(snapshot: Snapshot, name: str) -> _Found:
    backbone, augmentation = network_settings(snapshot)
    if backbone.name != name:
        raise ConfigError(
            f"--init.weights {snapshot.url} holds a {backbone.name}, and this run's network is {name}: give "
            f"--backbone.name {backbone.name}"
        )
    try:
        tensors = load(snapshot.read_file(NETWORK))
    except SafetensorError as error:
        raise ConfigError(f"{snapshot.url}: {NETWORK} is damaged ({error}): use another snapshot") from error
    return _Found(tensors, (augmentation.mean, augmentation.std))


def _state_dict(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a file; what else it holds is left out. Nothing in it is executed."""
    try:
        if where.endswith(".safetensors"):
            return load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many for files that are none of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--init.weights {where} is neither safetensors nor a state dict that can be read safely ({reason}): "
            "write network.state_dict(), tensors alone, with torch.save or safetensors"
        ) from error
    return dict(_tensors(content, ""))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _compare_normalization(config: RunConfig, theirs: Normalization | None) -> None:
    ours = (config.augmentation.mean, config.augmentation.std)
    if theirs is None or theirs == ours:
        return
    (mean, std) = (" ".join(f"{value:g}" for value in values) for values in theirs)
    logger.warning(
        "the weights were trained with another normalization of the images; to match it: --augmentation.mean %s "
        "--augmentation.std %s",
        *(mean, std),
    )
