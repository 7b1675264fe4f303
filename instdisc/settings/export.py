"""Settings of the export of a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Format = Literal["torchvision", "safetensors", "onnx"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written, and where."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    format: Annotated[Format, tyro.conf.arg(aliases=["-f"])]
    """torchvision: weights without the head, which load into torchvision's own model. safetensors: all weights, with
    what is needed to use them as metadata. onnx: the network from normalised images to unit embeddings, for any batch
    size."""
    output: Path | None = None
    """RUN/export/BACKBONE.pth, .safetensors or .onnx by default."""
