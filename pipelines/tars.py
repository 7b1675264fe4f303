"""Images in tar files: where each member lies, so that reading it later needs no tar library."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from pipelines.contents import Content, open_content, read_whole
from pipelines.errors import DataError
from pipelines.headers import HeaderError, checksum, image_size, summed
from pipelines.manifest import Rejected
from pipelines.places import Place, Url
from pipelines.scan import (
    Bar,
    Labels,
    LeftAside,
    Row,
    Scan,
    ends_like_an_image,
    is_hidden,
    is_image_name,
    nothing_found,
    number_labels,
    progress_bar,
)
from pipelines.strings import printable
from pipelines.tar_members import Member, archives

CLASS_NAMES = "classnames.txt"
_MACOS = "__MACOSX/"
# Far tars are listed at the same time, as each waits for its storage; so do the images of one.
_TARS_AT_A_TIME = 16
_IMAGES_AT_A_TIME = 256
_READERS = 8

logger = logging.getLogger(__name__)


class TarLabels(NamedTuple):
    """Where the labels of images in tar files come from."""

    kind: Labels = "auto"
    """ "none": nowhere. "folders": class folders. "auto": `.cls` or `.json` members, or class folders without those."""
    json_key: str | None = None
    """The key of `.json` members that holds the label; `a.b` is key b of the object at a."""

    @property
    def ending(self) -> str:
        """Of the members that hold labels."""
        return ".cls" if self.json_key is None else ".json"


class _Header(NamedTuple):
    height: int
    width: int
    checksum: int


def scan_tars(paths: Sequence[Place], labels: TarLabels, *, show_progress: bool) -> Scan:
    """List the images of tar files.

    A label is that of the `.cls` (a class number) or, where a key is given, the `.json` member of the same name: up to
    its ending or, as in WebDataset, up to the first dot of its last part. Without such members and below whatever
    folders all images share, images in at least two folders are of classes with the names of these. Classes with
    numbers are named by the lines of a file `classnames.txt` beside the first tar, where there is one.

    Where a tar holds both `1.png` and `1.mask.png`, the latter is no image but a field of the sample `1`. Members
    that follow an end mark count, as in tars joined by `cat`. Tars come in the order of their paths, images in the
    order in which their tar stores them. Where two tars share a name, every key starts with the path of its tar.

    Raises:
        DataError: A tar is cut short, damaged, compressed, holds a name twice, or a label is none.
    """
    paths = sorted({path.absolute() for path in paths}, key=str)
    if len({isinstance(path, Url) and path.parts[0] for path in paths}) > 1:
        raise DataError(
            f"{paths[0]} and {paths[-1]} are on different kinds of storage; give tars of one kind"
        )
    root = type(paths[0])(os.path.commonpath([path.parent for path in paths]))
    scan = Scan(root, [path.relative_to(root).as_posix() for path in paths], [], (), [], LeftAside())
    texts: list[str] = []
    total = sum(0 if isinstance(path, Url) else path.stat().st_size for path in paths)
    with progress_bar(show_progress, total or len(paths), "B" if total else " tars") as bar:
        for found, part in _scan_each(paths, scan, labels, bar):
            texts += found
            scan.rows.extend(part.rows)
            scan.rejected.extend(part.rejected)
            scan.left_aside.update(part.left_aside)
    where = paths[0] if len(paths) == 1 else f"{len(paths)} tar files in {root}"
    if not (scan.rows or scan.rejected):
        raise nothing_found(where, scan.left_aside)
    numbers, class_names = number_labels(texts, where)
    if labels.kind == "auto" and labels.json_key is not None and not class_names:
        raise DataError(
            f"{where}: no image has a .json member of its name with a label at {labels.json_key!r}; name the key that "
            "holds the labels, or none"
        )
    if labels.kind == "folders" or (labels.kind == "auto" and not class_names):
        numbers, class_names = _folder_labels(where, [row.key for row in scan.rows], labels.kind)
    elif class_names and all(text.isdecimal() for text in texts if text):
        class_names = _named(class_names, paths[0].with_name(CLASS_NAMES))
    rows = [row._replace(label=number) for row, number in zip(scan.rows, numbers, strict=True)]
    if len({row.key for row in rows}) < len(rows):
        rows = [row._replace(key=f"{scan.sources[row.source]}!{row.key}") for row in rows]
    return scan._replace(rows=rows, class_names=class_names)


def _scan_each(
    paths: Sequence[Place], scan: Scan, labels: TarLabels, bar: Bar
) -> Iterator[tuple[list[str], Scan]]:
    """Label of each image, and what was found, by tar."""

    def scan_one(source: int) -> tuple[list[str], Scan]:
        part = scan._replace(rows=[], rejected=[], left_aside=LeftAside())
        is_far = isinstance(paths[source], Url)
        with progress_bar(False, 0, "B") if is_far else nullcontext(bar) as bytes_bar:
            return _Tar(paths[source], source, part, labels).scan(bytes_bar), part

    if not isinstance(paths[0], Url):
        yield from map(scan_one, range(len(paths)))
        return
    with ThreadPoolExecutor(_TARS_AT_A_TIME, thread_name_prefix="tars") as pool:
        futures = deque(pool.submit(scan_one, source) for source in range(len(paths)))
        try:
            while futures:
                yield futures.popleft().result()
                bar.update(1)
        finally:
            pool.shutdown(cancel_futures=True)


class _Tar:
    """One tar file, whose images are appended to a scan."""

    def __init__(self, path: Place, source: int, scan: Scan, labels: TarLabels) -> None:
        self._path, self._source, self._scan, self._labels = path, source, scan, labels
        # Read on the way, by their place; what is not here is read when it is needed.
        self._headers: dict[int, _Header | HeaderError] = {}
        self._label_contents: dict[int, bytes] = {}

    def scan(self, bar: Bar) -> list[str]:
        """The label of each image appended, empty for none."""
        texts: list[str] = []
        seen: set[str] = set()
        with open_content(self._path) as content:
            parts = list(archives(self._path, content.size, content.file, bar, partial(self._look, content)))
            images = [list(self._images(members)) for members in parts]
            if content.read_through >= 0:
                self._read_headers(content, [member for members in images for member in members])
            labels = [self._texts(members, content) for members in parts]
            elsewhere = {stem: text for part in reversed(labels) for stem, text in part.items()}
            for number, (members, own) in enumerate(zip(images, labels, strict=True), start=1):
                for member in members:
                    key = f"{member.name}#{number}" if member.name in seen else member.name
                    seen.add(member.name)
                    if self._add(key, member, content):
                        texts.append(_label_of(member.name, own, elsewhere))
        return texts

    def _look(self, content: Content, member: Member) -> None:
        """Read a small member in passing, where going back to it would cost a request."""
        if not member.is_plain or member.size > content.read_through:
            return
        is_label = self._labels.kind == "auto" and member.name.lower().endswith(self._labels.ending)
        if is_label or is_image_name(member.name):
            content.file.seek(member.offset)
            data = content.file.read(member.size)
            if is_label:
                self._label_contents[member.offset] = data
            else:
                self._headers[member.offset] = _header(
                    lambda start, count: data[start : start + count], member
                )

    def _read_headers(self, content: Content, images: Sequence[Member]) -> None:
        """Read the headers of far images, many at a time."""
        later = [member for member in images if member.offset not in self._headers and member.is_plain]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="headers") as pool:
            for first in range(0, len(later), _IMAGES_AT_A_TIME):
                members = later[first : first + _IMAGES_AT_A_TIME]
                content.prepare(
                    (member.offset + start, count)
                    for member in members
                    for start, count in summed(member.size)
                )
                reads = [partial(_part, content, member.offset) for member in members]
                headers = pool.map(_header, reads, members)
                self._headers.update(
                    {member.offset: header for member, header in zip(members, headers, strict=True)}
                )

    def _images(self, members: Mapping[str, Member]) -> Iterator[Member]:
        """The images among the members; counts all others that are of no use."""
        samples = {key for name in members if ends_like_an_image(name) for key in _sample_keys(name)[:1]}
        used = self._labels.ending if self._labels.kind == "auto" else None
        for name, member in members.items():
            shorter = _sample_keys(name)[1:]
            if name.startswith(_MACOS) or f"/{_MACOS}" in name:
                self._scan.left_aside.add(name, _MACOS.rstrip("/"))
            elif not ends_like_an_image(name):
                if not (used and name.lower().endswith(used)) and not is_hidden(name):
                    self._scan.left_aside.add(name)
            elif is_hidden(name):
                self._scan.left_aside.add(name, "hidden")
            elif shorter and shorter[0] in samples:
                self._scan.left_aside.add(name, "a field beside the image of the same key")
            else:
                yield member

    def _add(self, key: str, member: Member, content: Content) -> bool:
        header = self._headers.get(member.offset) or _header(partial(_part, content, member.offset), member)
        if isinstance(header, HeaderError):
            name = f"{self._scan.sources[self._source]}!{key}"
            self._scan.rejected.append(Rejected(printable(name), str(header)))
            return False
        place = self._source, key, member.offset, member.size
        self._scan.rows.append(Row(*place, header.height, header.width, -1, header.checksum))
        return True

    def _texts(self, members: Mapping[str, Member], content: Content) -> dict[str, str]:
        """The label by what its member is called without the ending."""
        found: dict[str, str] = {}
        for member in members.values() if self._labels.kind == "auto" else ():
            stem, ending = os.path.splitext(member.name)  # noqa: PTH122  pathlib is slow for millions of names
            if ending.lower() != self._labels.ending:
                continue
            held = self._label_contents.get(member.offset)
            text = (content.part(member.offset, member.size) if held is None else held).strip()
            where = f"{self._path}!{member.name}"
            if self._labels.json_key is not None:
                found[stem] = sys.intern(_json_label(where, text, self._labels.json_key))
            elif text.isdigit():
                found[stem] = sys.intern(text.decode())
            else:
                raise DataError(f"{where} holds {text[:40]!r}, expected a class number (0, 1, ...)")
        return found


def _sample_keys(name: str) -> list[str]:
    """`cat/1.seg.png` -> `cat/1.seg`, `cat/1`: what its labels may be called, the likeliest first."""
    stem = os.path.splitext(name)[0]  # noqa: PTH122
    dot = name.find(".", name.rfind("/") + 2)
    return [stem] if dot < 0 or dot == len(stem) else [stem, name[:dot]]


def _label_of(name: str, own: Mapping[str, str], elsewhere: Mapping[str, str]) -> str:
    for labels in (own, elsewhere):
        for key in _sample_keys(name):
            if key in labels:
                return labels[key]
    return ""


def _json_label(where: str, content: bytes, key: str) -> str:
    """The label in a JSON object, empty if there is none."""
    try:
        value: Any = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write it again, or name no key") from error
    for part in [key] if isinstance(value, dict) and key in value else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict | list):
        raise DataError(f"{where} holds {str(value)[:40]} at {key!r}, expected a class number or name")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value or (isinstance(value, int) and value < 0):  # NaN differs from itself
        return ""
    return str(value).strip()


def _folder_labels(where: object, names: Sequence[str], kind: Labels) -> tuple[list[int], tuple[str, ...]]:
    """Label images by the first folder that they do not all share, if there is one for each and at least two."""
    shared = os.path.commonprefix([min(names, default=""), max(names, default="")])  # noqa: RUF071  cut at a slash below
    start = shared.rfind("/") + 1
    ends = [name.find("/", start) for name in names]
    direct = [name for name, end in zip(names, ends, strict=True) if end < 0]
    class_names = sorted({name[start:end] for name, end in zip(names, ends, strict=True) if end >= 0})
    if not direct and len(class_names) > 1:
        by_name = {name: number for number, name in enumerate(class_names)}
        return [by_name[name[start:end]] for name, end in zip(names, ends, strict=True)], tuple(class_names)
    if kind == "folders":
        held = f"{direct[0]} outside of class folders" if direct else f"images of {len(class_names)} folders"
        raise DataError(
            f'labels="folders" is for folders of images, or tar files of such; {where} holds {held}'
        )
    if direct and class_names:
        logger.warning(
            "no labels: %d images, e.g. %s, lie beside the folders in %s, so these are not taken for classes",
            *(len(direct), direct[0], where),
        )
    return [-1] * len(names), ()


def _named(numbers: tuple[str, ...], file: Place) -> tuple[str, ...]:
    content = read_whole(file)
    if content is None:
        return numbers
    names = tuple(content.decode().splitlines())
    if len(names) < len(numbers):
        raise DataError(f"{file} names {len(names)} classes, but the tar files hold class {len(numbers) - 1}")
    return names


def _header(read: Callable[[int, int], bytes], member: Member) -> _Header | HeaderError:
    """What is known of an image from a few bytes of it: `read(position, n)`."""
    try:
        if not member.is_plain:
            raise HeaderError("a link, device or sparse file inside the tar, expected the image itself")
        return _Header(*image_size(partial(read, 0), member.size), checksum(read, member.size))
    except HeaderError as error:
        return error


def _part(content: Content, offset: int, start: int, count: int) -> bytes:
    return content.part(offset + start, count)
