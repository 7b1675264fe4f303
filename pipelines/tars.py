"""Images in WebDataset tar files: where each member lies, so that reading it later needs no tar library."""

import logging
import mmap
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipelines.errors import DataError
from pipelines.headers import HeaderError, image_size
from pipelines.kinds import EXTENSIONS
from pipelines.manifest import Rejected
from pipelines.scan import LeftAside, Row, Scan, is_image_name, nothing_found, numbered_classes, progress_bar

CLASS_NAMES = "classnames.txt"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512

logger = logging.getLogger(__name__)


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    is_plain: bool


def scan_tars(paths: Sequence[Path], *, with_labels: bool, show_progress: bool) -> Scan:
    """List the images of tar files in WebDataset layout: `<key>.<image extension>`, optionally `<key>.cls`.

    As in WebDataset, a key ends at the first dot of the last part of a member's name. The `.cls` member holds
    the class number of the images with its key; the classes are named by the lines of a file `classnames.txt`
    beside the first tar, where there is one. Tars come in the order of their paths, images in the order in
    which their tar stores them. Where two tars share a name, every key starts with the path of its tar.

    Raises:
        DataError: A tar is cut short, damaged, compressed, holds a name twice, or a class number is none.
    """
    paths = sorted({path.absolute() for path in paths})
    root = Path(os.path.commonpath([path.parent for path in paths]))
    scan = Scan(root, [path.relative_to(root).as_posix() for path in paths], [], (), [], LeftAside())
    with progress_bar(show_progress, sum(path.stat().st_size for path in paths), "B") as bar:
        for source, path in enumerate(paths):
            _scan_tar(path, source, scan, with_labels, bar)
    if not (scan.rows or scan.rejected):
        where = paths[0] if len(paths) == 1 else f"{len(paths)} tar files in {root}"
        raise nothing_found(where, scan.left_aside)
    rows = scan.rows
    if len({row.key for row in rows}) < len(rows):
        rows = [row._replace(key=f"{scan.sources[row.source]}!{row.key}") for row in rows]
    return scan._replace(rows=rows, class_names=_class_names(rows, paths[0]))


def _scan_tar(path: Path, source: int, scan: Scan, with_labels: bool, bar: "tqdm[None]") -> None:
    """Append the images of one tar to `scan`."""
    members: dict[str, _Member] = {}
    for member in _members(path, bar):
        if member.name in members:
            raise DataError(
                f"{path} holds {member.name} twice, at bytes {members[member.name].offset} and "
                f"{member.offset}; names inside a tar must be unique"
            )
        members[member.name] = member
    skipped = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        labels = _labels(path, members, content) if with_labels else {}
        for member in members.values():
            key, extension = _split(member.name)
            if extension not in EXTENSIONS or not key.rpartition("/")[2]:
                skipped += is_image_name(member.name)
                if extension != ".cls" or not with_labels:
                    scan.left_aside.add(member.name)
                continue
            try:
                if not member.is_plain:
                    raise HeaderError("a link or a sparse file inside the tar, expected the image itself")
                height, width = image_size(partial(_head, content, member.offset), member.size)
            except HeaderError as error:
                scan.rejected.append(Rejected(f"{scan.sources[source]}!{member.name}", str(error)))
                continue
            label = labels.get(key, -1)
            scan.rows.append(Row(source, member.name, member.offset, member.size, height, width, label))
    if skipped:
        logger.warning("%s: %d images left out, their names read as <key>.<field>.<ext>", path, skipped)


def _members(path: Path, bar: "tqdm[None]") -> Iterator[_Member]:
    """All members but folders, in the order in which they are stored."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(map(len, _COMPRESSED)))
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"{path} is compressed with {program}, expected a plain tar; uncompress it first"
                )
        try:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                done = 0
                for member in tar:
                    end = member.offset_data + (member.size if member.isreg() else 0)
                    if end > size:
                        raise DataError(
                            f"{path} is cut short: {member.name} takes bytes {member.offset_data} to {end}, "
                            f"but the file ends at byte {size}; copy or write it again"
                        )
                    bar.update(end - done)
                    done = end
                    if not member.isdir():
                        is_plain = member.isreg() and not member.issparse()
                        yield _Member(
                            member.name.removeprefix("./"), member.offset_data, member.size, is_plain
                        )
                position = tar.offset
        except tarfile.ReadError as error:
            raise DataError(f"{path}, {size} bytes, is not a tar file or is damaged: {error}") from error
        # tarfile takes any block that it cannot read for the end.
        file.seek(position)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(
                f"{path} is cut short or damaged: no member and no end mark at byte {position} of {size}; "
                "copy or write it again"
            )


def _labels(path: Path, members: dict[str, _Member], content: mmap.mmap) -> dict[str, int]:
    """The class number of every key that has one."""
    labels = {}
    for member in members.values():
        key, extension = _split(member.name)
        if extension == ".cls":
            text = content[member.offset : member.offset + member.size].strip()
            if not text.isdigit():
                raise DataError(
                    f"{path}!{member.name} holds {text[:40]!r}, expected a class number (0, 1, ...)"
                )
            labels[key] = int(text)
    return labels


def _class_names(rows: Sequence[Row], first: Path) -> tuple[str, ...]:
    numbers = numbered_classes((row.label for row in rows), first.parent)
    file = first.with_name(CLASS_NAMES)
    if not numbers or not file.exists():
        return numbers
    names = tuple(file.read_text().splitlines())
    if len(names) < len(numbers):
        raise DataError(f"{file} names {len(names)} classes, but the tar files hold class {len(numbers) - 1}")
    return names


def _split(name: str) -> tuple[str, str]:
    """`cat/1.seg.png` -> `cat/1`, `.seg.png`: the key, and the extension as WebDataset sees it."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{extension}".lower()


def _head(content: mmap.mmap, start: int, count: int) -> bytes:
    return content[start : start + count]
