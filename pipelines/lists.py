"""Text files that name images, or tar files of images."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.files import HeaderOrWhyNot, read_headers, scan_of_files
from pipelines.kinds import EXTENSIONS
from pipelines.places import Place, is_url, place
from pipelines.scan import LeftAside, Scan, ends_like_an_image, number_labels
from pipelines.strings import printable

LISTS = (".csv", ".tsv", ".txt")
_DELIMITERS = (",", ";", "\t")
# Names of columns, the likeliest first; compared in lower case, `_` for spaces and dashes.
_PATHS = (
    *("path", "file_path", "filepath", "image_path", "imagepath", "img_path", "file", "filename"),
    *("file_name", "fname", "image_file", "image_filename", "img_file", "image", "images", "img"),
    *("image_name", "imagename", "img_name", "name", "uri", "url", "image_id", "imageid", "img_id", "id"),
)
_LABELS = (
    *("label", "labels", "class", "class_name", "classname", "class_label", "label_name", "category"),
    *("category_name", "target", "species", "tag", "class_id", "classid", "label_id", "category_id", "y"),
)
_ENDINGS = "|".join(re.escape(ending) for ending in sorted(EXTENSIONS, key=len, reverse=True))
_PATH_AND_LABEL = re.compile(rf'"?(.*(?:{_ENDINGS}))"?(?:[ ,;]+(.*))?', re.IGNORECASE)

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    line: int
    name: str
    label: str  # empty for none


def scan_list(path: Path, *, with_labels: bool, show_progress: bool) -> Scan:
    """List the images that a text file names, in its order; paths are relative to its folder, or absolute.

    A .csv or .tsv file has one or two columns, `path,label`, separated by commas, semicolons or tabs. A first line
    that names the columns is known by the usual names, and then there may be more of them. A line of a .txt file is a
    path, alone or followed by a label after a tab, comma, semicolon or space; a line that ends like an image and has
    no tab is all path. Labels are class numbers if all of them are whole numbers, else class names.

    Raises:
        DataError: A line is not of that form, names a file twice, or files are missing.
    """
    root = path.parent
    entries = [entry._replace(name=normalize(root, entry.name)) for entry in _entries(path)]
    if not entries:
        raise DataError(f"{path} is empty, expected the path of an image on every line")
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.name in lines:
            raise DataError(
                f"{path}, lines {lines[entry.name]} and {entry.line}: {printable(entry.name)} is named "
                "twice; keep one of them"
            )
        lines[entry.name] = entry.line
    labels, class_names = _labels(path, entries) if with_labels else ([-1] * len(entries), ())
    names = list(lines)
    headers = read_headers(root, names, show_progress=show_progress)
    missing = _missing(names, headers)
    if missing:
        is_header = missing[0] == names[0] and not ends_like_an_image(names[0])
        hint = "; if the first line names the columns, call them path and label" if is_header else ""
        raise DataError(
            f"{path}: {len(missing)} of {len(names)} files do not exist, e.g. {_some(missing)}; "
            f"paths are taken relative to {root.absolute()}{hint}"
        )
    return scan_of_files(root, names, headers, labels, class_names, LeftAside())


def scan_files(paths: Sequence[str | Path], *, show_progress: bool) -> Scan:
    """List image files, in the order given; their keys are absolute paths.

    Raises:
        DataError: A file is given twice, or files are missing.
    """
    root = Path.cwd()
    names = [normalize(root, str(Path(path).expanduser().absolute())) for path in paths]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    if twice:
        raise DataError(f"{printable(min(twice))} is given twice; give every image once")
    headers = read_headers(root, names, show_progress=show_progress)
    missing = _missing(names, headers)
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} files do not exist, e.g. {_some(missing)}")
    return scan_of_files(root, names, headers, [-1] * len(names), (), LeftAside())


def _missing(names: Sequence[str], headers: Sequence[HeaderOrWhyNot]) -> list[str]:
    return [
        name for name, header in zip(names, headers, strict=True) if isinstance(header, FileNotFoundError)
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:3]))


def listed_tars(path: Path) -> list[Place]:
    """The tar files, or patterns of such, that a text file names one to a line; none if its first line is no tar.

    Raises:
        DataError: A later line is none.
    """
    lines = [(number, line.strip()) for number, line in _lines(_text(path)) if line.strip()]
    if not lines or not lines[0][1].lower().endswith(".tar"):
        return []
    for number, line in lines:
        if not line.lower().endswith(".tar"):
            raise DataError(
                f"{path}, line {number}: got {line[:100]!r}, expected a .tar file as in the first line"
            )
    return [place(line) if is_url(line) else path.parent / Path(line).expanduser() for _, line in lines]


def normalize(root: Path, name: str) -> str:
    """Drop `./`, `//` and `folder/..`, so that every file has one name; `..` behind a link is another folder and stays.

    Args:
        root: What relative names are relative to.
        name: A path.
    """
    path = Path(name)
    if ".." not in path.parts:
        return path.as_posix()
    kept: list[str] = []
    for part in path.parts:
        if part == ".." and kept and kept[-1] != ".." and not (root / Path(*kept)).is_symlink():
            if kept != [path.anchor]:  # above the root there is the root
                kept.pop()
        else:
            kept.append(part)
    return Path(*kept).as_posix()


def _entries(path: Path) -> Iterator[_Entry]:
    text = _text(path)
    first = next((line for _, line in _lines(text) if line.strip()), "")
    unquoted = re.sub(r'"[^"]*"', "", first)
    delimiter = next((each for each in _DELIMITERS if each in unquoted), ",")
    if path.suffix.lower() == ".txt" and _column(_PATHS, first.split(delimiter)) is None:
        return _loose_entries(path, text)
    # A name may hold what separates columns elsewhere.
    is_one_column = ends_like_an_image(first.strip()) and delimiter != ","
    return _table_entries(path, text, "," if is_one_column else delimiter)


def _table_entries(path: Path, text: str, delimiter: str) -> Iterator[_Entry]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    path_column, label_column, width = 0, 1, 2
    is_first = True
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if is_first and (found := _column(_PATHS, cells)) is not None:
                path_column, label_column, width = found, _label_column(path, cells, found), len(cells)
            else:
                cells += [""] * (max(path_column, label_column) + 1 - len(cells))
                if any(cells[width:]) or not cells[path_column]:
                    raise DataError(
                        f"{path}, line {reader.line_num}: got {row}, expected `path` or `path,label`, or more columns "
                        "that the first line names"
                    )
                yield _Entry(
                    reader.line_num, cells[path_column], cells[label_column] if label_column >= 0 else ""
                )
            is_first = False
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _label_column(path: Path, names: Sequence[str], path_column: int) -> int:
    """Which column holds the labels, -1 for none."""
    others = [number for number in range(len(names)) if number != path_column]
    found = _column(_LABELS, names)
    if found is not None and found != path_column:
        return found
    if len(others) > 1:
        logger.warning(
            "%s: no labels, as none of its columns %s is called label or class", path, ", ".join(names)
        )
    return others[0] if len(others) == 1 else -1


def _column(known: Sequence[str], names: Sequence[str]) -> int | None:
    """The column with the likeliest of the known names."""
    plain = [name.strip().strip("\"'").lower().replace(" ", "_").replace("-", "_") for name in names]
    return next((plain.index(name) for name in known if name in plain), None)


def _loose_entries(path: Path, text: str) -> Iterator[_Entry]:
    first = next((number for number, line in _lines(text) if line.strip()), 0)
    for number, line in _lines(text):
        name, label = line.strip(), ""
        is_header = number == first and set(name.lower().split()) <= {*_PATHS, *_LABELS}
        if not name or is_header:
            continue
        if "\t" in name:
            name, _, label = name.rpartition("\t")
        elif not ends_like_an_image(name):
            match = _PATH_AND_LABEL.fullmatch(name)
            if match is None:
                raise DataError(
                    f"{path}, line {number}: got {line.rstrip()[:100]!r}, expected the path of an image, "
                    "then a label or nothing"
                )
            name, label = match.groups(default="")
        yield _Entry(number, name.strip(), label.strip().strip('"'))


def _text(path: Path) -> str:
    """The content of a list: UTF-8, though names may be any bytes, or UTF-16 that says so, as Windows writes it."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-16 text, although its first bytes say so: save it as UTF-8"
            ) from error
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataError(f"{path}, line {line}: holds a zero byte, expected a list of paths as UTF-8 text")
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(io.StringIO(text, newline=None), start=1)


def _labels(path: Path, entries: Sequence[_Entry]) -> tuple[list[int], tuple[str, ...]]:
    """Label of every row, -1 for none, and the class names."""
    texts = [entry.label for entry in entries]
    if all(text.removeprefix("-").isdecimal() for text in texts if text):
        for entry in entries:
            if entry.label.startswith("-"):
                raise DataError(
                    f"{path}, line {entry.line}: class number {entry.label}, expected 0, 1, ... or nothing"
                )
    return number_labels(texts, path)
