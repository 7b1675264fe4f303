"""Settings of the export of a network, or of the vectors of an index or a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Format = Literal["torchvision", "safetensors", "onnx", "parquet", "npy"]
VECTOR_FORMATS = ("parquet", "npy")
"""Those that hold vectors; the others hold a network."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_INDEX")]
    """A run directory, a directory of snapshots, one snapshot or an index, local or at a URL."""
    format: Annotated[Format, tyro.conf.arg(aliases=["-f"])]
    """torchvision: weights without the head, which load into torchvision's own model. safetensors: all weights, with
    what is needed to use them as metadata. onnx: the network from normalized images to unit embeddings, for any batch
    size. parquet: a row for each image, with its key as text and as bytes, its vector, its class and the identity of
    the network. npy: the same as one structured array of NumPy."""
    output: Path | None = None
    """By default RUN/export/BACKBONE.pth, .safetensors or .onnx, or RUN/export/embeddings.parquet or .npy; export/… in
    the current directory for a snapshot or an index."""
