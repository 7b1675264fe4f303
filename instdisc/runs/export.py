"""Write a trained network in the format of another program; `instdisc/index/export.py` writes vectors."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from cluster.collection import is_collection, open_collection
from cluster.snapshots import COMMIT, open_snapshot, snapshot_steps
from cluster.tables import Tables
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import CIFAR_RESNETS, Embedder, head_of, without_auxiliary
from instdisc.runs.network import load_network, network_settings
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.export import ExportConfig
from instdisc.settings.model import TIMM
from pipelines.whole import written_whole

_SUFFIXES = {"torchvision": ".pth", "safetensors": ".safetensors", "onnx": ".onnx"}
_TOLERANCE = 1e-4


def export(config: ExportConfig) -> str:
    """Write the file and return how to use it.

    Raises:
        ConfigError: No trained network is there, or it cannot be had in this format.
        OSError: The file cannot be written.
    """
    snapshot, folder = open_exported(config.source)
    network, (backbone, augmentation) = load_network(snapshot), network_settings(snapshot)
    facts = {
        "backbone": backbone.name,
        "embedding_dim": backbone.embedding_dim,
        "stem": backbone.stem,
        "image_size": augmentation.image_size,
        "mean": list(augmentation.mean),
        "std": list(augmentation.std),
    }
    suffix = _SUFFIXES[config.format]
    file = f"{backbone.name.replace(':', '-')}{suffix}"
    path = (config.output or folder / "export" / file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        usage = _EXPORTERS[config.format](network, facts, partial)
    return f"{path}\n\n{usage.replace('FILE', repr(str(path)))}"


def open_exported(source: str) -> tuple[Tables, Path]:
    """What is exported, and the folder that holds it; the current one where a snapshot or an index is named.

    Args:
        source: A run directory, a directory of snapshots, one snapshot or an index.

    Raises:
        ConfigError: There is none.
        SnapshotError: It cannot be read.
    """
    place = source if "://" in source else Path(source).expanduser().absolute()
    if is_collection(place):
        return open_collection(place), Path()
    if isinstance(place, str) or snapshot_steps(place) or (place / COMMIT).exists():
        return open_snapshot(place), Path()
    run = RunDirectory(place)
    return run.open_snapshot(), run.path


def export_torchvision(network: Embedder, facts: dict[str, Any], path: Path) -> str:
    """Write the state dict of the backbone without its head.

    Raises:
        ConfigError: torchvision has no such network.
    """
    name = facts["backbone"]
    if name in CIFAR_RESNETS or name.startswith(TIMM):
        raise ConfigError(
            f"{name} is not a torchvision network: use --format safetensors or onnx, or train one, such as resnet18"
        )
    head, _ = head_of(network.backbone)
    weights = {
        key: value for key, value in network.backbone.state_dict().items() if not key.startswith(f"{head}.")
    }
    content = io.BytesIO()  # that a disk is full is an OSError of our own writing, and of torch none
    torch.save(weights, content)
    path.write_bytes(content.getbuffer())
    options = without_auxiliary(name, init_weights=False)
    with torch.device("meta"):
        plain = torchvision.models.get_model(name, weights=None, **options)
    arguments = "".join(f", {option}={value}" for option, value in options.items())
    lines = [
        "import torch, torchvision",
        f"network = torchvision.models.{name}(weights=None{arguments})",
        *_stem_lines(network.backbone, plain),
        f"network.set_submodule({head!r}, torch.nn.Identity())",
        "network.load_state_dict(torch.load(FILE, weights_only=True), strict=True)",
        _normalization(facts),
    ]
    return "\n".join(lines)


def _stem_lines(backbone: nn.Module, plain: nn.Module) -> list[str]:
    """How to give torchvision's model the stem for small images, where this one has it."""
    name, stem = next((name, part) for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d))
    if stem.weight.shape == plain.get_submodule(name).weight.shape:
        return []
    new = f"torch.nn.Conv2d({stem.in_channels}, {stem.out_channels}, 3, padding=1, bias={stem.bias is not None})"
    lines = [f"network.set_submodule({name!r}, {new})  # the stem for small images"]
    ours = dict(backbone.named_modules())
    dropped = [
        name
        for name, part in plain.named_modules()
        if isinstance(part, nn.MaxPool2d) and isinstance(ours[name], nn.Identity)
    ]
    return lines + [f"network.set_submodule({name!r}, torch.nn.Identity())" for name in dropped]


def export_safetensors(network: Embedder, facts: dict[str, Any], path: Path) -> str:
    """Write all weights, head included."""
    from safetensors.torch import save

    weights = {key: value.contiguous() for key, value in network.backbone.state_dict().items()}
    path.write_bytes(save(weights, metadata={name: json.dumps(value) for name, value in facts.items()}))
    return "\n".join(
        [
            "from safetensors.torch import load_file",
            "from instdisc.model.backbone import build_embedder",
            "from instdisc.settings.model import BackboneConfig",
            f"config = BackboneConfig(name={facts['backbone']!r}, embedding_dim={facts['embedding_dim']}, "
            f"stem={facts['stem']!r})",
            f"network = build_embedder(config, image_size={facts['image_size']}).eval()",
            "network.backbone.load_state_dict(load_file(FILE))",
            _normalization(facts),
        ]
    )


def export_onnx(network: Embedder, facts: dict[str, Any], path: Path) -> str:
    """Write an ONNX graph, having compared its output with the network's.

    Raises:
        ConfigError: The packages are missing, or the network cannot be expressed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch needs it
    except ImportError as error:
        raise ConfigError(
            f"ONNX export needs a package that is not installed ({error}): pip install 'instdisc[onnx]'"
        ) from error
    size = facts["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except RuntimeError as error:
        raise ConfigError(f"ONNX cannot express this network ({error}): use another format") from error
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.save_model(model, path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    _compare(network, session, torch.cat([images, images.flip(0), images[:1]]))
    return "\n".join(
        [
            "import onnxruntime",
            "session = onnxruntime.InferenceSession(FILE)",
            f"(embeddings,) = session.run(None, {{'images': images}})  # float32 (B, 3, {size}, {size}) to "
            f"(B, {facts['embedding_dim']})",
            _normalization(facts),
        ]
    )


def _compare(network: Embedder, session: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = network(images)
    (found,) = session.run(None, {"images": images.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= _TOLERANCE:
        raise ConfigError(
            f"the ONNX graph differs from the network by {difference:.1e}, more than {_TOLERANCE}: use another format"
        )


def _normalization(facts: dict[str, Any]) -> str:
    return (
        f"# images: float, {facts['image_size']} x {facts['image_size']} pixels in [0, 1], minus {facts['mean']}, "
        f"divided by {facts['std']}"
    )


_EXPORTERS = {"torchvision": export_torchvision, "safetensors": export_safetensors, "onnx": export_onnx}
