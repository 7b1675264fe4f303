"""A table of rows, partitioned over ranks, as one Zarr array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cluster.partition import Partition


def create_table(
    path: Path, partition: Partition, like: Tensor, attributes: Mapping[str, str | int | float]
) -> None:
    """Create an array for all rows, replacing what is there. One rank calls; the others wait for it.

    bfloat16, which Zarr does not know, is stored as float32.

    Args:
        path: Where the array goes.
        partition: The rows and their blocks; a block is one chunk, so that no two ranks write to one chunk.
        like: Any shard of the table, (S, D); gives D and the dtype.
        attributes: JSON values, kept with the array.
    """
    import zarr

    zarr.create_array(
        store=str(path),
        shape=(partition.num_rows, like.shape[1]),
        chunks=(partition.block, like.shape[1]),
        dtype=_storable(like[:0]).numpy().dtype,
        compressors=None,
        attributes=dict(attributes),
        overwrite=True,
    )


def write_rows(path: Path, start: int, rows: Tensor) -> None:
    """Write this rank's shard.

    Args:
        path: An array that `create_table` made.
        start: Number of the first row; a multiple of the partition's block.
        rows: (S, D).
    """
    import zarr

    array = zarr.open_array(str(path), mode="r+")
    array[start : start + len(rows)] = _storable(rows).numpy()


def _storable(rows: Tensor) -> Tensor:
    rows = rows.detach().cpu()
    return rows.float() if rows.dtype == torch.bfloat16 else rows
