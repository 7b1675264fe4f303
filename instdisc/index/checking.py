"""Whether an index is whole: every checksum, every key once, every vector of length 1."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from cluster.collection import KEY_HASHES, KEYS, Collection, hash_keys
from cluster.errors import SnapshotError
from instdisc.index.images import EMBEDDINGS
from pipelines.scan import progress_bar

_TOLERANCE = {"float32": 1e-3, "float16": 4e-3}


def verify(index: Collection) -> int:
    """Read everything, and print what is broken.

    Returns:
        0 if the index is whole, 1 otherwise.
    """
    with progress_bar(True, 2 * len(index.blocks), " blocks") as bar:
        faults = list(index.verify(bar.update))
        if not faults:
            faults = list(_content_faults(index, bar.update))
    for fault in faults:
        print(f"broken: {fault}", file=sys.stderr)
    if faults:
        print(
            f"{len(faults)} broken: restore the files named from a copy, or embed the images into a new index"
        )
        return 1
    (_, dim), dtype = index.tables[EMBEDDINGS]
    print(f"{index.url}: whole, {index.num_rows:,} images in {len(index.blocks):,} blocks, {dim} x {dtype}")
    return 0


def _content_faults(index: Collection, on_block: Callable[[], object]) -> Iterator[str]:
    seen = np.empty(index.num_rows, np.uint64)
    for number, entry in enumerate(index.blocks):
        start, stop = index.bounds_of(number)
        try:
            vectors = index.read(EMBEDDINGS, start, stop)
            keys, hashes = index.read(KEYS, start, stop), index.read(KEY_HASHES, start, stop)
        except SnapshotError as error:
            yield str(error)
            continue
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = ~(np.abs(lengths - 1) < _TOLERANCE[str(vectors.dtype)])
        if wrong.any():
            yield f"{entry.name}: {int(wrong.sum())} vectors are not of length 1, e.g. of {keys[wrong][0]}"
        if (hash_keys(keys.tolist()) != hashes).any():
            yield f"{entry.name}: key hashes are not of its keys"
        seen[start:stop] = hashes
        on_block()
    again = index.num_rows - len(np.unique(seen))
    if again:
        yield f"{again} keys are there twice"
