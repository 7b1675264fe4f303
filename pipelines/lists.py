"""Text files that name images."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.files import read_headers, scan_of_files
from pipelines.scan import LeftAside, Scan, is_image_name, numbered_classes


class _Entry(NamedTuple):
    line: int
    name: str
    label: str  # empty for none


def scan_list(path: Path, *, with_labels: bool, show_progress: bool) -> Scan:
    """List the images that a text file names, in its order; paths are relative to its folder, or absolute.

    A .csv file has one or two columns, `path,label`, and may have these names as its first line. A line of a
    .txt file is a path, alone or followed by a label after a tab or space; a line that ends like an image and
    has no tab is all path. Labels are class numbers if all of them are whole numbers, else class names.

    Raises:
        DataError: A line is not of that form, names a file twice, or files are missing.
    """
    entries = list(_csv_entries(path) if path.suffix.lower() == ".csv" else _txt_entries(path))
    if not entries:
        raise DataError(f"{path} is empty, expected the path of an image on every line")
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.name in lines:
            raise DataError(
                f"{path}, lines {lines[entry.name]} and {entry.line}: {entry.name} is named twice"
            )
        lines[entry.name] = entry.line
    labels, class_names = _labels(path, entries) if with_labels else ([-1] * len(entries), ())
    root, names = path.parent, list(lines)
    headers = read_headers(root, names, show_progress=show_progress)
    missing = [
        name for name, header in zip(names, headers, strict=True) if isinstance(header, FileNotFoundError)
    ]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(names)} files do not exist, e.g. {', '.join(missing[:3])}; "
            f"paths are taken relative to {root.absolute()}"
        )
    return scan_of_files(root, names, headers, labels, class_names, LeftAside())


def _csv_entries(path: Path) -> Iterator[_Entry]:
    reader = csv.reader(_lines(path), strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (reader.line_num == 1 and cells[0].lower() == "path"):
                continue
            if len(cells) > 2 or not cells[0]:
                raise DataError(
                    f"{path}, line {reader.line_num}: got {cells}, expected `path` or `path,label`"
                )
            yield _Entry(reader.line_num, _normal(cells[0]), cells[1] if len(cells) == 2 else "")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _txt_entries(path: Path) -> Iterator[_Entry]:
    for number, line in enumerate(_lines(path), start=1):
        name, label = line.strip(), ""
        if not name:
            continue
        if "\t" in name:
            name, _, label = name.rpartition("\t")
        elif not is_image_name(name):
            name, _, label = name.rpartition(" ")
        name = name.strip()
        if not is_image_name(name):
            raise DataError(
                f"{path}, line {number}: got {line[:100]!r}, expected the path of an image, "
                "then a label or nothing"
            )
        yield _Entry(number, _normal(name), label.strip())


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: {line[:100]!r} is not UTF-8 text") from error


def _normal(name: str) -> str:
    """Without `./` and the like, so that every file has one name."""
    return Path(os.path.normpath(name)).as_posix()


def _labels(path: Path, entries: Sequence[_Entry]) -> tuple[list[int], tuple[str, ...]]:
    """Label of every row, -1 for none, and the class names."""
    given = {entry.label for entry in entries if entry.label}
    if all(label.removeprefix("-").isdecimal() for label in given):
        for entry in entries:
            if entry.label.startswith("-"):
                raise DataError(
                    f"{path}, line {entry.line}: class number {entry.label}, expected 0, 1, ... or nothing"
                )
        labels = [int(entry.label or -1) for entry in entries]
        return labels, numbered_classes(labels, path)
    class_names = tuple(sorted(given))
    numbers = {name: number for number, name in enumerate(class_names)}
    return [numbers.get(entry.label, -1) for entry in entries], class_names
