"""Folders of images, with or without classes."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.files import Header, read_headers, scan_of_files
from pipelines.scan import (
    Labels,
    LeftAside,
    Scan,
    ends_like_an_image,
    is_hidden,
    is_image_name,
    nothing_found,
)

_TRAIN = "train"
_HELD_OUT = ("val", "valid", "validation", "test")  # the first of these that fits is measured on
_MACOS = "__MACOSX"  # what macOS puts beside the content of its zip files

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Two folders with the same class folders."""

    train: Path
    held_out: Path
    beside: tuple[str, ...]
    """Names of the other folders."""


def find_splits(root: Path) -> Splits | None:
    """Find folders `train` and `val`, `valid`, `validation` or `test`, of any case, with the same class folders.

    A class folder lies directly in the split and holds images at any depth. Held-out images need not be of all
    classes. What else lies in `root` does not matter.
    """
    folders = sorted(_visible_folders(root))
    trains = [name for name in folders if name.lower() == _TRAIN]
    candidates = [name for kind in _HELD_OUT for name in folders if name.lower() == kind]
    for train in trains if candidates else ():
        classes = _class_folders(root / train)
        for held_out in candidates:
            found = _class_folders(root / held_out)
            if found and found <= classes:
                beside = tuple(name for name in folders if name not in (train, held_out))
                return Splits(root / train, root / held_out, beside)
    return None


def scan_folder(root: Path, *, labels: Labels, show_progress: bool) -> Scan:
    """List the images in `root` at any depth, sorted by path; hidden files and folders do not count.

    Links are followed, but each folder counts once.

    Args:
        root: The folder.
        labels: "folders": every folder directly in `root` that holds images is a class. "none": no labels. "auto":
            "folders" if at least two folders hold images and no image lies directly in `root`, else "none".
        show_progress: Whether to draw a progress bar.

    Raises:
        DataError: There is no image, or one outside of class folders.
    """
    left_aside = LeftAside()
    names = sorted(walk(root, left_aside))
    images = []
    for name in names:
        if is_image_name(name):
            images.append(name)
        elif not is_hidden(name):
            left_aside.add(name)
        elif ends_like_an_image(name):
            left_aside.add(name, "hidden")
    if not images:
        tars = [name for name in names if name.lower().endswith(".tar")]
        pattern = root / ("*.tar" if all("/" not in name for name in tars) else "**/*.tar")
        raise nothing_found(root, left_aside, f"for the tar files give '{pattern}'" if tars else "")
    headers = read_headers(root, images, show_progress=show_progress)
    usable = [name for name, header in zip(images, headers, strict=True) if isinstance(header, Header)]
    class_names = _class_names(root, usable, labels)
    for _ in set(_visible_folders(root)) - set(class_names) if class_names else ():
        left_aside.add_folder("without usable images")
    numbers = {name: number for number, name in enumerate(class_names)}
    row_labels = [numbers.get(name.partition("/")[0], -1) for name in images]
    return scan_of_files(root, images, headers, row_labels, class_names, left_aside)


def _class_names(root: Path, images: Sequence[str], labels: Labels) -> tuple[str, ...]:
    folders = {name.partition("/")[0] for name in images if "/" in name}
    direct = [name for name in images if "/" not in name]
    if labels == "auto" and direct and folders:
        logger.warning(
            "no labels: %d images, e.g. %s, lie directly in %s, so its folders are not taken for classes",
            len(direct),
            direct[0],
            root,
        )
    if labels == "none" or (labels == "auto" and (direct or len(folders) < 2)):
        return ()
    if direct:
        raise DataError(
            f"{len(direct)} images, e.g. {direct[0]}, lie directly in {root}, expected all in class folders; "
            'move them, or ask for labels="none"'
        )
    kinds = {name.lower() for name in folders}
    if _TRAIN in kinds and kinds.intersection(_HELD_OUT):
        logger.warning(
            "%s: its folders %s are taken for classes, since two of them that are named like splits do not hold the "
            "same class folders; if they are splits, give one of them",
            root,
            ", ".join(sorted(folders)),
        )
    return tuple(sorted(folders))


def _class_folders(split: Path) -> set[str]:
    return {
        name
        for name in _visible_folders(split)
        if any(is_image_name(path) for path in walk(split / name, LeftAside()))
    }


def _visible_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if not _is_passed_over(entry.name) and entry.is_dir()]


def _is_passed_over(folder: str) -> bool:
    return folder.startswith(".") or folder == _MACOS


def walk(root: Path, left_aside: LeftAside) -> Iterator[str]:
    """Paths of all files, relative to `root`. Links to folders are followed, but no folder is entered twice.

    What really lies in `root` comes first, so that its names do not depend on links to it.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    starts = deque([root])
    while starts:
        for folder, subfolders, files in os.walk(starts.popleft(), onerror=fail):
            here = Path(folder)
            status = here.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                subfolders.clear()
                continue
            seen.add(identity)
            for name in filter(_is_passed_over, subfolders):
                left_aside.add_folder(_MACOS if name == _MACOS else "hidden")
            subfolders[:] = sorted(name for name in subfolders if not _is_passed_over(name))
            links = [here / name for name in subfolders if (here / name).is_symlink()]
            starts.extend(link for link in links if not _leads_up(link))  # os.walk does not enter links
            relative = here.relative_to(root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            yield from (prefix + name for name in files)


def _leads_up(link: Path) -> bool:
    """Whether a link leads to a folder above it, which may hold far more than the data set."""
    return link.parent.resolve().is_relative_to(link.resolve())
