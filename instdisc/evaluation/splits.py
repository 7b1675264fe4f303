"""Choices among labelled rows: a balanced share of every class, and classes kept for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instdisc.errors import ConfigError
from instdisc.seeding import derive_seed

FIRST_HALF = "first-half"


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


def held_out_classes(class_names: Sequence[str], split: str) -> list[str]:
    """The classes that retrieval is tested on.

    Args:
        class_names: All classes, in the order of their numbers.
        split: "first-half": training has the first half of the classes, the other half is held out (Ye et al. 2019);
            else the path of a file with the name of one held-out class per line.

    Raises:
        ConfigError: The file cannot be read or names an unknown class, or less than two classes are held out.
    """
    if split == FIRST_HALF:
        held_out = list(class_names[len(class_names) // 2 :])
    else:
        try:
            lines = Path(split).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the class split {split}: {error}; expected {FIRST_HALF!r} or a file with a class per line"
            ) from error
        held_out = [line.strip() for line in lines if line.strip()]
        unknown = sorted(set(held_out) - set(class_names))
        if unknown:
            raise ConfigError(
                f"{split} names {unknown[0]!r}, which is no class of the images: {', '.join(class_names[:5])}, …"
            )
    if len(held_out) < 2:
        raise ConfigError(
            f"{split} holds out {len(held_out)} classes: retrieval among them needs two or more"
        )
    return held_out
