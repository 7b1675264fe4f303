"""From whatever holds the images to the manifest."""

import logging
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np

from pipelines.decode import CorruptImage
from pipelines.errors import DataError, naming_the_cause
from pipelines.exif import TURNS, UPRIGHT, orientation
from pipelines.folders import Splits, find_splits, scan_folder
from pipelines.kinds import EXTENSIONS
from pipelines.lists import LISTS, listed_tars, scan_files, scan_list
from pipelines.manifest import Manifest
from pipelines.patterns import expand_braces, find, is_pattern
from pipelines.places import Place, Url, is_url, place
from pipelines.reader import ImageReader
from pipelines.remote import list_tars
from pipelines.scan import Labels, Row, Scan, is_image_name
from pipelines.strings import StringTable, printable
from pipelines.tars import TarLabels, scan_tars

Paths = str | Place | Sequence[str | Place]
"""What images are found by: a path or URL, or several."""

_FORMS = (
    "expected a folder of images, WebDataset .tar files (one, a folder of them, or a pattern), "
    "or a .txt, .csv or .tsv list of images"
)

logger = logging.getLogger(__name__)


def build_manifest(
    path: Paths,
    *,
    labels: Labels = "auto",
    label_key: str | None = None,
    split: Literal["train", "held-out"] = "train",
    show_progress: bool = True,
    upright: bool = True,
) -> Manifest:
    """Find all images of a data set and read their headers; no image is decoded.

    Args:
        path: One of
            - a folder of class folders, images at any depth, or of images without labels (`scan_folder`),
            - a tar file, a folder of such, a pattern (`shards/train-*.tar`, `train-{0000..0127}.tar`) or a list of
              paths and patterns (`scan_tars`); each may be a URL that fsspec opens,
            - a .txt, .csv or .tsv file that names images (`scan_list`) or, one to a line, tar files,
            - a list of image files, without labels (`scan_files`).
        labels: "none" ignores all labels; "folders" insists that `path` holds class folders; "auto" decides.
        label_key: The key of the `.json` members of tar files that holds the label, instead of `.cls` members.
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
        scan = _scan(chosen, TarLabels(labels, label_key), show_progress)
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


def held_out_beside(path: Paths) -> Path | None:
    """The folder that `build_manifest` takes for the held-out split of `path`, None if there is none.

    Raises:
        DataError: A folder cannot be listed.
    """
    with naming_the_cause(f"read {path}"):
        splits = _find_splits(path)
    return splits.held_out if splits else None


def _choose_split(path: Paths, split: Literal["train", "held-out"]) -> Paths:
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


def _find_splits(path: Paths) -> Splits | None:
    if not isinstance(path, str | Path) or is_url(path):
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
    return replace(manifest, heights=heights, widths=widths, checksums=None, upright=False)


def _scan(path: Paths, labels: TarLabels, show_progress: bool) -> Scan:
    if not isinstance(path, str | Path | Url) and path:
        files = [part for part in path if not is_url(part) and not _is_named_like_a_tar(part)]
        if len(files) == len(path):
            return scan_files([str(file) for file in files], show_progress=show_progress)
    tars = tars_of(path)
    if tars or not isinstance(path, str | Path):
        return scan_tars(tars, labels, show_progress=show_progress)
    path = Path(path).expanduser()
    if path.is_dir():
        return scan_folder(path, labels=labels.kind, show_progress=show_progress)
    if labels.kind == "folders":
        raise DataError(f'labels="folders" is for folders of images, but {path} is a list')
    return scan_list(path, with_labels=labels.kind != "none", show_progress=show_progress)


def tars_of(path: Paths) -> Sequence[Place]:
    """The tar files that `path` stands for, as `build_manifest` takes it; none if it is a folder of images or a list.

    Raises:
        DataError: It is none of these either.
    """
    if not isinstance(path, str | Path | Url):
        if not path:
            raise DataError(f"got 0 tar files, not found: []; {_FORMS}")
        return _all_tars(path)
    if is_url(path):
        return _far_tars(place(path))
    path = Path(path).expanduser()
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name[0] != ".")
        tars = [entry for entry in entries if _is_named_like_a_tar(entry)]
        images = [entry for entry in entries if is_image_name(entry.name)]
        if tars and images:
            raise DataError(
                f"{path} holds {len(tars)} tar files and {len(images)} images, expected one kind; give "
                f"{path / '*.tar'} for the tars, or move them away"
            )
        return tars
    if path.is_file():
        if path.suffix.lower() in LISTS:
            return _all_tars(listed_tars(path))
        if _is_named_like_a_tar(path):
            return [path]
        raise DataError(f"{path} is a {path.suffix or 'nameless'} file; {_FORMS}")
    if path.exists():
        raise DataError(f"{path} is a pipe, socket or device; {_FORMS}")
    matches = find(path)
    if not matches:
        raise DataError(f"nothing at {path} (in {Path.cwd()}): {_why_missing(path)}; {_FORMS}")
    strangers = [match for match in matches if match.suffix.lower() != ".tar" or not match.is_file()]
    if strangers:
        raise DataError(f"{path} matches {strangers[0]}, expected only .tar files; narrow the pattern")
    return matches


def _all_tars(parts: Sequence[str | Place]) -> list[Place]:
    """The tar files of a list, whose parts may be patterns."""
    found: list[list[Place]] = []
    wrong: list[str] = []
    for part in parts:
        if is_url(part):
            found.append(_far_tars(place(part)))
            continue
        path = Path(part).expanduser()
        tars = [path] if path.exists() else find(path)
        if not tars or not all(map(Path.is_file, tars)):
            wrong.append(str(part))
        found.append([*tars])
    if wrong:
        raise DataError(f"got {len(parts)} tar files, not found: {wrong[:3]}")
    return [tar for tars in found for tar in tars]


def _far_tars(url: Place) -> list[Place]:
    """The tar files that a URL stands for: one, those of a pattern, or those directly in a folder.

    Those that are named are not looked for yet: listing them does.

    Raises:
        DataError: There are none.
    """
    assert isinstance(url, Url)
    if url.suffix.lower() in (*LISTS, *EXTENSIONS) or (
        _is_named_like_a_tar(url.name) and url.suffix.lower() != ".tar"
    ):
        raise DataError(
            f"{url}: in object storage images lie in uncompressed .tar files; give those, or name their URLs in a "
            "local .txt"
        )
    found: list[Place] = []
    for name in map(Url, expand_braces(str(url))):
        if name.suffix.lower() == ".tar" and not is_pattern(str(name)):
            found.append(name)
            continue
        with naming_the_cause(f"list {name}"):
            tars = list_tars(name)
        strangers = [tar for tar in tars if tar.suffix.lower() != ".tar"]
        if strangers:
            raise DataError(f"{name} matches {strangers[0]}, expected only .tar files; narrow the pattern")
        if not tars:
            raise DataError(
                f"no .tar files at {name}; in object storage images lie in .tar files: name them, or their folder"
            )
        found += tars
    return found


def _is_named_like_a_tar(path: str | Place) -> bool:
    """Compressed ones included, which are refused with a reason."""
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    return ".tar" in suffixes[-2:] or suffixes[-1:] == [".tgz"]


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
        checksums=np.array(columns["checksum"], "<u4"),
        class_names=tuple(map(printable, scan.class_names)),
        rejected=tuple(scan.rejected),
    )
