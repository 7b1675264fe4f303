"""Choices among labelled rows: a balanced share of every class, and some of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instdisc.common.errors import ConfigError
from instdisc.common.seeding import derive_seed

_PARTS = ("all", "first-half", "second-half")


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


def choose_classes(class_names: Sequence[str], which: str) -> list[str]:
    """Some of the classes of a set of images.

    Args:
        class_names: All classes, in the order of their numbers.
        which: "all", "first-half" or "second-half" of them (Ye et al. 2019 train on one half and retrieve among the
            other), or the path of a file with the name of one class per line.

    Raises:
        ConfigError: The file cannot be read, names an unknown class or none at all.
    """
    half = len(class_names) // 2
    if which in _PARTS:
        return list(
            {"all": class_names, "first-half": class_names[:half], "second-half": class_names[half:]}[which]
        )
    try:
        lines = Path(which).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the classes in {which}: {error}; expected {', '.join(_PARTS)} or a file with a class per line"
        ) from error
    chosen = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    unknown = sorted(set(chosen) - set(class_names))
    if unknown or not chosen:
        wrong = f"names {unknown[0]!r}, which is no class of the images" if unknown else "names no class"
        raise ConfigError(f"{which} {wrong}: {', '.join(class_names[:5])}, …")
    return chosen
