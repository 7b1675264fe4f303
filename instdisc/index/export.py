"""Write the vectors of an index or a run for other programs, each with its key and the network that it is of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.tables import Tables
from instdisc.index.images import EMBEDDINGS, KEYS, LABELS
from instdisc.index.model import Model, model_of
from instdisc.runs.export import open_exported
from instdisc.settings.export import ExportConfig
from pipelines.scan import progress_bar
from pipelines.strings import unprinted
from pipelines.whole import written_whole

_ROWS = 65_536  # read at a time


def export_vectors(config: ExportConfig) -> str:
    """Write the file and return how to read it.

    Raises:
        ConfigError: There is no run or index.
        SnapshotError: It cannot be read, or a piece is damaged.
        OSError: The file cannot be written.
    """
    tables, folder = open_exported(config.source)
    path = (config.output or folder / "export" / f"embeddings.{config.format}").expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write = {"parquet": _write_parquet, "npy": _write_npy}[config.format]
    with written_whole(path) as partial:
        usage = write(tables, model_of(tables), partial)
    return f"{path}\n\n{usage.replace('FILE', repr(str(path)))}"


def _spans(tables: Tables) -> Iterator[tuple[int, int]]:
    with progress_bar(True, tables.num_rows, " rows") as bar:
        for start in range(0, tables.num_rows, _ROWS):
            stop = min(tables.num_rows, start + _ROWS)
            yield start, stop
            bar.update(stop - start)


def _vectors(tables: Tables, start: int, stop: int) -> npt.NDArray[np.float32]:
    return tables.read(EMBEDDINGS, start, stop).astype("<f4", copy=False)


def _labels(tables: Tables, start: int, stop: int) -> npt.NDArray[np.int32]:
    if LABELS not in tables.tables:
        return np.full(stop - start, -1, np.int32)
    return tables.read(LABELS, start, stop).astype(np.int32, copy=False)


def _raw(key: str) -> bytes:
    """The name as the file system or tar file has it."""
    return os.fsencode(unprinted(key))


def _write_parquet(tables: Tables, model: Model, path: Path) -> str:
    dim = tables.tables[EMBEDDINGS][0][1]
    names = [*tables.attributes.get("class_names", ())]
    schema = pa.schema(
        {
            "key": pa.string(),
            "key_bytes": pa.binary(),
            "vector": pa.list_(pa.float32(), dim),
            "label": pa.int32(),
            "class": pa.string(),
            "model": pa.string(),
        },
        metadata={"model": json.dumps(model.to_json())},
    )
    # A file, not its path: Arrow opens none that is not UTF-8.
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start, stop in _spans(tables):
            keys = tables.read(KEYS, start, stop).tolist()
            labels = _labels(tables, start, stop)
            columns: list[Any] = [
                pa.array(keys, pa.string()),
                pa.array(map(_raw, keys), pa.binary()),
                pa.FixedSizeListArray.from_arrays(pa.array(_vectors(tables, start, stop).ravel()), dim),
                pa.array(labels, mask=labels < 0),
                pa.array([names[label] if label >= 0 else None for label in labels.tolist()], pa.string()),
                pa.array([str(model)] * len(keys), pa.string()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return "\n".join(
        [
            "import pyarrow.parquet",
            "table = pyarrow.parquet.read_table(FILE)",
            f"vectors = table['vector'].combine_chunks().flatten().to_numpy().reshape(-1, {dim})",
            "# key_bytes is the name of the file; key is text, in which bytes that are not UTF-8 are escaped",
        ]
    )


def _write_npy(tables: Tables, model: Model, path: Path) -> str:
    dim, count = tables.tables[EMBEDDINGS][0][1], tables.num_rows
    longest = 1
    for start in range(0, count, _ROWS):
        keys = tables.read(KEYS, start, min(count, start + _ROWS))
        longest = max(longest, *(len(_raw(key)) for key in keys))
    fields = [
        ("key", f"S{longest}"),
        ("vector", "<f4", (dim,)),
        ("label", "<i4"),
        ("model", f"S{len(str(model))}"),
    ]
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(fields), shape=(count,))
    for start, stop in _spans(tables):
        rows["key"][start:stop] = [_raw(key) for key in tables.read(KEYS, start, stop)]
        rows["vector"][start:stop] = _vectors(tables, start, stop)
        rows["label"][start:stop] = _labels(tables, start, stop)
        rows["model"][start:stop] = str(model).encode()
    rows.flush()
    return "\n".join(
        [
            "import numpy",
            "rows = numpy.load(FILE, mmap_mode='r')",
            "vectors, keys = rows['vector'], rows['key']  # keys are bytes; rows['model'] is the same in every row",
        ]
    )
