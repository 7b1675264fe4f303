"""From whatever holds the images to the manifest."""

import logging
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.decode import CorruptImage
from pipelines.errors import DataError, naming_the_cause
from pipelines.exif import TURNS, UPRIGHT, orientation
from pipelines.folders import Splits, find_splits, scan_folder
from pipelines.lists import scan_list
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader
from pipelines.scan import Labels, Row, Scan, is_image_name
from pipelines.strings import StringTable
from pipelines.tars import scan_tars

_LISTS = (".csv", ".txt")
_FORMS = (
    "expected a folder of images, WebDataset .tar files (one, a folder of them, or a pattern), "
    "or a .txt or .csv list of images"
)

logger = logging.getLogger(__name__)


def build_manifest(
    path: str | Path | Sequence[str | Path],
    *,
    labels: Labels = "auto",
    split: Literal["train", "held-out"] = "train",
    show_progress: bool = True,
    upright: bool = True,
) -> Manifest:
    """Find all images of a data set and read their headers; no image is decoded.

    Args:
        path: One of
            - a folder of class folders, images at any depth, or of images without labels (`scan_folder`),
            - a tar file in WebDataset layout, a folder of such, a pattern (`shards/train-*.tar`) or a list of
              paths (`scan_tars`),
            - a .txt or .csv file that names images (`scan_list`).
        labels: "none" ignores all labels; "folders" insists that `path` holds class folders; "auto" decides.
        split: Which one to take where `path` is a folder of a training split and a held-out one with the same class
            folders (`find_splits`). Without labels all images are taken.
        show_progress: Whether to draw a progress bar on standard error if it takes more than a second.
        upright: Whether images are to be turned as their EXIF orientation says; False where they are to be compared
            with those of a manifest of schema 1. Then every file is read whole.

    Returns:
        The manifest. What is named like an image but is empty, none, or ends inside its header is in
        `rejected`. The row order depends on the names alone, never on the file system. A warning counts whatever was
        found and not taken, by ending and reason.

    Raises:
        DataError: There is nothing at `path`, no readable image in it, or what it holds cannot be trusted.
    """
    if isinstance(path, str) and not path:
        raise DataError(f"got an empty path; {_FORMS}")
    with naming_the_cause(f"read {path}"):
        chosen = path if labels == "none" else _choose_split(path, split)
        scan = _scan(chosen, labels, show_progress)
    for name, reason in scan.rejected:
        scan.left_aside.add(name, reason.partition(":")[0])  # what follows tells of this file alone
    if not scan.rows:
        first = scan.rejected[0]
        raise DataError(
            f"none of {len(scan.rejected)} images can be used, e.g. {first.name}: {first.reason}; "
            f"found {scan.left_aside}"
        )
    if scan.left_aside:
        logger.warning("%s: %d images taken; left aside: %s", chosen, len(scan.rows), scan.left_aside)
    manifest = _manifest(scan)
    return manifest if upright else _as_stored(manifest)


def held_out_beside(path: str | Path | Sequence[str | Path]) -> Path | None:
    """The folder that `build_manifest` takes for the held-out split of `path`, None if there is none.

    Raises:
        DataError: A folder cannot be listed.
    """
    with naming_the_cause(f"read {path}"):
        splits = _find_splits(path)
    return splits.held_out if splits else None


def _choose_split(
    path: str | Path | Sequence[str | Path], split: Literal["train", "held-out"]
) -> str | Path | Sequence[str | Path]:
    splits = _find_splits(path)
    if splits is None:
        return path
    taken = splits.train if split == "train" else splits.held_out
    beside = f"; also not taken: {', '.join(splits.beside)}" if splits.beside else ""
    logger.warning(
        "%s: training on %s and measuring on %s, which hold the same classes; these are the images of %s%s",
        *(path, splits.train.name, splits.held_out.name, taken.name, beside),
    )
    return taken


def _find_splits(path: str | Path | Sequence[str | Path]) -> Splits | None:
    if not isinstance(path, str | Path):
        return None
    folder = Path(path).expanduser()
    return find_splits(folder) if folder.is_dir() else None


def _as_stored(manifest: Manifest) -> Manifest:
    heights, widths = manifest.heights.copy(), manifest.widths.copy()
    with closing(ImageReader(manifest)) as reader:
        for row in range(len(manifest)):
            with suppress(CorruptImage):  # whoever loads it finds out
                if TURNS[orientation(reader.read(row)) or UPRIGHT].swap:
                    heights[row], widths[row] = manifest.widths[row], manifest.heights[row]
    return replace(manifest, heights=heights, widths=widths, upright=False)


def _scan(path: str | Path | Sequence[str | Path], labels: Labels, show_progress: bool) -> Scan:
    tars = _tars(path)
    if tars:
        if labels == "folders":
            raise DataError(f'labels="folders" is for folders of images, but {path} is read as tar files')
        return scan_tars(tars, with_labels=labels != "none", show_progress=show_progress)
    assert isinstance(path, str | Path)
    path = Path(path).expanduser()
    if path.is_dir():
        return scan_folder(path, labels=labels, show_progress=show_progress)
    if labels == "folders":
        raise DataError(f'labels="folders" is for folders of images, but {path} is a list')
    return scan_list(path, with_labels=labels != "none", show_progress=show_progress)


def _tars(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files that `path` stands for, none if it is a folder of images or a list.

    Raises:
        DataError: It is none of these either.
    """
    if not isinstance(path, str | Path):
        found = [Path(part).expanduser() for part in path]
        wrong = [part for part in found if not part.is_file()]
        if wrong or not found:
            raise DataError(f"got {len(found)} tar files, not found: {[str(part) for part in wrong[:3]]}")
        return found
    path = Path(path).expanduser()
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.is_file())
        tars = [entry for entry in entries if entry.suffix == ".tar"]
        images = [entry for entry in entries if is_image_name(entry.name)]
        if tars and images:
            raise DataError(
                f"{path} holds {len(tars)} tar files and {len(images)} images, expected one kind; give "
                f"{path / '*.tar'} for the tars, or move them away"
            )
        return tars
    if path.is_file():
        if path.suffix.lower() in _LISTS:
            return []
        if ".tar" in path.suffixes or path.suffix == ".tgz":
            return [path]
        raise DataError(f"{path} is a {path.suffix or 'nameless'} file; {_FORMS}")
    if path.exists():
        raise DataError(f"{path} is a pipe, socket or device; {_FORMS}")
    matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not matches:
        raise DataError(f"nothing at {path} (in {Path.cwd()}): {_why_missing(path)}; {_FORMS}")
    strangers = [match for match in matches if match.suffix != ".tar"]
    if strangers:
        raise DataError(f"{path} matches {strangers[0]}, expected only .tar files; narrow the pattern")
    return matches


def _why_missing(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return error.strerror or str(error)
    return "it appeared just now"


def _manifest(scan: Scan) -> Manifest:
    columns: dict[str, tuple[Any, ...]] = dict(zip(Row._fields, zip(*scan.rows, strict=True), strict=True))
    return Manifest(
        root=scan.root,
        sources=StringTable.of(scan.sources),
        keys=StringTable.of(columns["key"]),
        source_index=np.array(columns["source"], "<i8"),
        offsets=np.array(columns["offset"], "<i8"),
        sizes=np.array(columns["size"], "<i8"),
        heights=np.array(columns["height"], "<i4"),
        widths=np.array(columns["width"], "<i4"),
        labels=np.array(columns["label"], "<i4"),
        class_names=scan.class_names,
        rejected=tuple(scan.rejected),
    )
