"""Files that are whole or not there, and JSON lines."""

from __future__ import annotations

import json
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.whole import written_whole

logger = logging.getLogger(__name__)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system at once; a full disk costs the line and nothing more."""
    length = None
    try:
        with path.open("ab") as file:
            length = file.tell()
            file.write(json.dumps(values).encode() + b"\n")
    except OSError as error:
        logger.warning("a line could not be added to %s: %s", path, error)
        with suppress(OSError):
            if length is not None:
                os.truncate(path, length)  # else the next line would continue the half of this one


def read_regular(path: Path) -> bytes:
    """The content of a file, at once: whoever opens a named pipe like any other file waits for its writer.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is a pipe or a device, expected a regular file")
        return file.read()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole objects of a JSON-lines file; none if there is no file. Damaged lines are passed over."""
    rows = [parse_object(line) for line in read_regular(path).splitlines()] if path.exists() else []
    return [row for row in rows if row is not None]


def parse_object(content: bytes | str) -> dict[str, Any] | None:
    """The JSON object that the content is; None if it is damaged or another JSON value."""
    with suppress(ValueError, RecursionError):  # text that is not UTF-8 is a ValueError too
        values = json.loads(content)
        return values if isinstance(values, dict) else None
    return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or not there; bytes of names that are not UTF-8 are escaped."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
