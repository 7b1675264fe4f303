"""Attributes of images other than their class, from a CSV file: key, attribute, value."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instdisc.common.errors import ConfigError
from pipelines.manifest import Manifest

_HEADER = ["key", "attribute", "value"]


@dataclass(frozen=True)
class Attributes:
    """What a file says of the images of a manifest with N rows.

    Attributes:
        labels: By attribute int64 (N,), the number of each image's value, in the order of the values' names; -1 where
            the file gives none.
        unknown_keys: Different keys of the file that no image has.
    """

    labels: Mapping[str, npt.NDArray[np.int64]]
    unknown_keys: int


def read_attributes(file: Path, manifest: Manifest) -> Attributes:
    """Read a CSV file whose first line is `key,attribute,value` and whose others give an image one value each.

    Args:
        file: The file.
        manifest: The images; keys are theirs.

    Raises:
        ConfigError: The file cannot be read, has other columns, gives an image two values of one attribute, or has no
            key that an image has; names the line.
    """
    given = _read(file)
    rows = {key: row for row, key in enumerate(manifest.keys)}
    keys = {key for values in given.values() for key in values}
    unknown = keys - rows.keys()
    if len(unknown) == len(keys):
        known = f"those of the images are such as {manifest.keys[0]}"
        got = f"got {min(keys)}" if keys else "got none"
        raise ConfigError(f"--statistics.attributes {file} has no key of an image: {got}, {known}")
    labels = {}
    for attribute, values in sorted(given.items()):
        numbers = {value: number for number, value in enumerate(sorted(set(values.values())))}
        labels[attribute] = np.full(len(manifest), -1, np.int64)
        for key, value in values.items():
            if key in rows:
                labels[attribute][rows[key]] = numbers[value]
    return Attributes(labels, len(unknown))


def _read(file: Path) -> dict[str, dict[str, str]]:
    """The value of each key, by attribute."""
    where = f"--statistics.attributes {file}"
    given: dict[str, dict[str, str]] = {}
    try:
        with file.expanduser().open(newline="", encoding="utf-8-sig") as opened:
            lines = csv.reader(opened)
            header = [name.strip().lower() for name in next(lines, [])]
            if header != _HEADER:
                raise ConfigError(f"{where} begins with {','.join(header)!r}, expected key,attribute,value")
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(_HEADER) or not all(fields):
                    raise ConfigError(
                        f"{where}, line {lines.line_num}: {','.join(fields)!r}, expected key,attribute,value"
                    )
                key, attribute, value = fields
                if given.setdefault(attribute, {}).setdefault(key, value) != value:
                    raise ConfigError(
                        f"{where}, line {lines.line_num}: {key} has {attribute} {value}, and before it "
                        f"{given[attribute][key]}: give one value"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {where}: {error}; expected a CSV of key,attribute,value") from error
    return given
