"""The mean and whitening of an index, with which its vectors are compared where all directions are to count alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from cluster.collection import Collection
from instdisc.index.images import EMBEDDINGS
from instdisc.model.whitening import Whitening, fit

WHITENING = "whitening.safetensors"
FITTED_ROWS = "whitening_rows"
"""The attribute that says of how many rows the whitening is."""
_MOST_ROWS = 200_000


def is_outgrown(index: Collection) -> bool:
    """Whether the rows have doubled or halved since the whitening was fitted."""
    fitted, now = index.attributes.get(FITTED_ROWS, 0), index.num_rows
    return now > 0 and not fitted / 2 <= now <= 2 * fitted


def fitted_whitening(index: Collection) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Fit the whitening to the vectors of an index, or to 200,000 of them that are spread evenly.

    Returns:
        Files and attributes of the index to commit.
    """
    rows = np.linspace(0, index.num_rows - 1, min(index.num_rows, _MOST_ROWS)).astype(np.int64)
    vectors = index.read_rows(EMBEDDINGS, rows).astype(np.float32)
    whitening = fit(torch.from_numpy(vectors))
    tensors = {"mean": whitening.mean_D, "matrix": whitening.matrix_DK.contiguous()}
    return {WHITENING: save(tensors)}, {FITTED_ROWS: index.num_rows}


def read_whitening(index: Collection) -> Whitening:
    """The whitening of an index.

    Raises:
        SnapshotError: It is missing or damaged.
    """
    tensors = load(index.read_file(WHITENING))
    return Whitening(tensors["mean"], tensors["matrix"])
