"""Tables of images for people and programs: the same as CSV and Parquet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.manifest import Manifest
from pipelines.strings import unprinted
from pipelines.whole import written_whole


def image_columns(images: Manifest) -> dict[str, Any]:
    """What a table says of each image: `key`, `key_bytes` and, where there are labels, `class`."""
    names = [images.name(row) for row in range(len(images))]
    columns: dict[str, Any] = {
        "key": names,
        "key_bytes": pa.array([os.fsencode(unprinted(name)) for name in names], pa.binary()),
    }
    if images.has_labels:
        labels = images.labels.tolist()
        columns["class"] = pa.array(
            [images.class_names[label] if label >= 0 else None for label in labels], pa.string()
        )
    return columns


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write `path.parquet` and `path.csv`, each whole or not at all; bytes are in the first alone."""
    table = pa.table(dict(columns))
    # Files, not paths: Arrow opens none that is not UTF-8.
    with written_whole(path.with_suffix(".parquet")) as partial, partial.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
    text = table.select([field.name for field in table.schema if field.type != pa.binary()])
    with written_whole(path.with_suffix(".csv")) as partial, partial.open("wb") as file:
        pyarrow.csv.write_csv(text, file)
