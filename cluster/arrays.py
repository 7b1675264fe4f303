"""Arrays in files, read by rows: NumPy's .npy and Zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ClusterError


class StoredArray:
    """An array in a file.

    Args:
        array: Anything sliced by rows.
        attributes: JSON values kept with it.
    """

    def __init__(self, array: Any, attributes: dict[str, Any]) -> None:
        self._array, self.attributes = array, attributes
        self.shape: tuple[int, ...] = tuple(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1."""
        return np.asarray(self._array[start:stop])


def is_array(path: str) -> bool:
    """Whether a path is that of an array: it ends in .npy, or is a Zarr array."""
    place = Path(path).expanduser()
    return place.suffix in (".npy", ".zarr") or (place / "zarr.json").exists()


def open_array(path: str) -> StoredArray:
    """Open an array; its rows are read when asked for.

    Raises:
        ClusterError: There is none, or it is damaged.
    """
    place = Path(path).expanduser()
    try:
        if place.suffix == ".npy":
            return StoredArray(np.load(place, mmap_mode="r"), {})
        import zarr

        array = zarr.open_array(str(place), mode="r")
        return StoredArray(array, dict(array.attrs))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is no array that can be read ({error}): give a .npy file or a Zarr array"
        ) from error
