"""Folders of images, with or without classes."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import DataError
from pipelines.files import read_headers, scan_of_files
from pipelines.scan import Labels, Scan, is_image_name, nothing_found

_SPLITS = frozenset(("test", "train", "unlabeled", "unlabelled", "val", "valid", "validation"))

logger = logging.getLogger(__name__)


def scan_folder(root: Path, *, labels: Labels, show_progress: bool) -> Scan:
    """List the images in `root` at any depth, sorted by path; hidden files and folders do not count.

    Links are followed, but each folder counts once.

    Args:
        root: The folder.
        labels: "folders": every folder directly in `root` is a class. "none": no labels. "auto": "folders" if
            at least two folders hold images and no image lies directly in `root`, else "none".
        show_progress: Whether to draw a progress bar.

    Raises:
        DataError: There is no image, or one outside of class folders, or the folders are named like splits.
    """
    names = sorted(_walk(root))
    images = [name for name in names if is_image_name(name)]
    if not images:
        raise nothing_found(root, names)
    class_names = _class_names(root, images, labels)
    numbers = {name: number for number, name in enumerate(class_names)}
    row_labels = [numbers.get(name.partition("/")[0], -1) for name in images]
    headers = read_headers(root, images, show_progress=show_progress)
    return scan_of_files(root, images, headers, row_labels, class_names)


def _class_names(root: Path, images: list[str], labels: Labels) -> tuple[str, ...]:
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
    if folders <= _SPLITS:
        raise DataError(
            f"the folders in {root} ({', '.join(sorted(folders))}) are splits, expected classes; give one of "
            f'them, e.g. {root / min(folders)}, or ask for labels="none"'
        )
    # A class without images keeps its number, so that the splits of a data set agree.
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."))


def _walk(root: Path) -> Iterator[str]:
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
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            links = [here / name for name in subfolders if (here / name).is_symlink()]
            starts.extend(link for link in links if not _leads_up(link))  # os.walk does not enter links
            relative = here.relative_to(root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            yield from (prefix + name for name in files if name[0] != ".")


def _leads_up(link: Path) -> bool:
    """Whether a link leads to a folder above it, which may hold far more than the data set."""
    return link.parent.resolve().is_relative_to(link.resolve())
