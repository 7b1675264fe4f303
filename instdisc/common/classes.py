"""Classes of images: matched between two sets of images, chosen, and parts of every one drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instdisc.common.errors import ConfigError
from instdisc.common.seeding import derive_seed
from pipelines.manifest import Manifest

_PARTS = ("all", "first-half", "second-half")


def match_classes(names: Sequence[str], bank_names: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Number the classes of the queries as the bank does, matched by name.

    Returns:
        int64 (len(names),), the bank's number of each class, those that it lacks numbered on from its last, and the
        names of these in their order.

    Raises:
        ConfigError: They have no class in common.
    """
    numbers = {name: number for number, name in enumerate(bank_names)}
    unknown = [name for name in names if name not in numbers]
    if len(unknown) == len(names):
        raise ConfigError(
            f"the images to classify have none of the training images' classes: {', '.join(names[:3])}, … are not "
            f"among {', '.join(bank_names[:3])}, …; classes are matched by name"
        )
    numbers |= {name: len(bank_names) + number for number, name in enumerate(unknown)}
    return np.array([numbers[name] for name in names], np.int64), unknown


def labels_among(test: Manifest, train: Manifest) -> npt.NDArray[np.int64]:
    """The labels of test images in the numbers of the training classes; see `match_classes`.

    Returns:
        int64 (len(test),), -1 for an image without a label.

    Raises:
        ConfigError: No test image has a label, or they have no class in common.
    """
    labels = np.asarray(test.labels, dtype=np.int64)
    if not (labels >= 0).any():
        raise ConfigError("no test image has a label: omit --data.test-path or name labeled images")
    numbers, _ = match_classes(test.class_names, train.class_names)
    return np.where(labels >= 0, numbers[np.maximum(labels, 0)], -1)


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
        wrong = f"names {unknown[0]!r}, which is not a class of the images" if unknown else "names no class"
        raise ConfigError(f"{which} {wrong}: {', '.join(class_names[:5])}, …")
    return chosen


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


def part_of_images(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """A part of the images, drawn at random: of every class the same share, see `class_balanced_rows`.

    Args:
        manifest: The images; those without a label count as one class more.
        fraction: The share, above 0 and at most 1. A smaller one's images are among a larger one's.
        seed: Of the draw.

    Returns:
        The part, in the order of `manifest`.

    Raises:
        ConfigError: It would hold no image of a class, or none at all; names the class with the fewest images.
    """
    labels = np.asarray(manifest.labels)
    rows = class_balanced_rows(labels + 1, fraction, seed=seed, at_least=0)
    known = labels[labels >= 0] if (labels >= 0).any() else labels
    missing = sorted(
        (int((labels == label).sum()), label) for label in np.setdiff1d(known, labels[rows]).tolist()
    )
    if missing:
        count, label = missing[0]
        of_class = f" of class {manifest.class_names[label]}" if label >= 0 else ""
        raise ConfigError(
            f"--data.fraction {fraction:g} takes none of the {count} images{of_class}: give at least "
            f"{math.ceil(1e4 / count) / 1e4:g}, or choose classes with more images by --data.classes"
        )
    return manifest.select(rows)
