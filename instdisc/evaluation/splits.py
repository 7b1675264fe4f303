"""The same share of every class of labelled rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from instdisc.common.seeding import derive_seed


def class_balanced_rows(
    labels: npt.NDArray[np.integer], fraction: float, *, seed: int, at_least: int = 1
) -> npt.NDArray[np.int64]:
    """The same share of every class, drawn at random. A smaller fraction's rows are among a larger one's.

    Args:
        labels: (N,); rows with a negative label are never chosen.
        fraction: Share of each class, 0 to 1, rounded to whole rows.
        seed: Of the draw.
        at_least: Rows per class, as far as it has them.

    Returns:
        int64 (M,), ascending.
    """
    chosen = []
    for label in np.unique(labels[labels >= 0]).tolist():
        members = np.flatnonzero(labels == label)
        generator = np.random.default_rng(derive_seed(seed, "class-balanced", label))
        count = min(max(round(fraction * len(members)), at_least), len(members))
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate([*chosen, np.zeros(0, dtype=np.int64)])).astype(np.int64)
