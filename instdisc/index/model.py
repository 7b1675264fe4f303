"""Which network vectors are of. Two networks never mix in one index."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from cluster.tables import Tables
from instdisc.runs.network import NETWORK, network_settings

ATTRIBUTE = "model"
"""The attribute of an index that holds a `Model`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained network, by what it is.

    Attributes:
        run: The run that trained it: its id.
        step: Of the snapshot.
        weights: SHA-256 (hex) of the file of its weights.
        backbone: Its name.
    """

    run: str
    step: int
    weights: str
    backbone: str

    def __str__(self) -> str:
        """Short enough for every row of a table: the first digits of the hash, and the step."""
        return f"{self.weights[:16]}@{self.step}"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def model_of(tables: Tables) -> Model:
    """The network of a snapshot or of an index.

    Raises:
        SnapshotError: A snapshot holds no network, or it is damaged.
    """
    noted = tables.attributes.get(ATTRIBUTE)
    if noted is not None:
        return Model(**noted)
    backbone, _ = network_settings(tables)
    return Model(
        run=str(tables.attributes.get("run_id", "")),
        step=tables.step,
        weights=hashlib.sha256(tables.read_file(NETWORK)).hexdigest(),
        backbone=backbone.name,
    )
