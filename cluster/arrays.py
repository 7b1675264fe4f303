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
        path: Where it is.
        array: Anything sliced by rows.
        attributes: JSON values kept with it.
    """

    def __init__(self, path: str, array: Any, attributes: dict[str, Any]) -> None:
        self._path, self._array, self.attributes = path, array, attributes
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1.

        Raises:
            ClusterError: They cannot be read, or are damaged.
        """
        try:
            return np.asarray(self._array[start:stop])
        except Exception as error:  # every store and codec of Zarr has errors of its own
            raise ClusterError(
                f"rows {start} to {stop} of {self._path} cannot be read ({error}): write the array again"
            ) from error


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
            loaded = np.load(place, mmap_mode="r")
            if not isinstance(loaded, np.ndarray):
                raise ValueError("it holds several arrays")
            return StoredArray(path, loaded, {})
        import zarr

        array = zarr.open_array(str(place), mode="r")
        return StoredArray(path, array, dict(array.attrs))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not a readable array ({error}): give a .npy file or a Zarr array"
        ) from error
