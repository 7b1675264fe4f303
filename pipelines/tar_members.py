"""The members of tar files and where they lie."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from pipelines.errors import DataError
from pipelines.places import Place
from pipelines.scan import Bar

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_ZEROS_AT_A_TIME = 1 << 20

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A member that is not a folder."""

    name: str
    offset: int
    """Bytes from the start of the file to its content."""
    size: int
    is_plain: bool
    """Whether these bytes are its content; not so for links, devices and sparse files."""


def archives(
    path: Place, size: int, file: IO[bytes], bar: Bar, look: Callable[[Member], None]
) -> Iterator[dict[str, Member]]:
    """Yield the members by name, as they are stored, of each of the archives that a file holds one after the other.

    Usually it is one; `cat` joins several. What follows an end mark and is no tar is named in a warning.

    Args:
        path: Of the file, for messages.
        size: Its bytes.
        file: Opened, at its beginning.
        bar: Counts bytes.
        look: Called with each member when the walk is at its content, which may be read with `file`.

    Raises:
        DataError: The file is cut short, damaged or compressed, or an archive holds a name twice.
    """
    _refuse_compressed(path, file.read(max(map(len, _COMPRESSED))))
    position = 0
    while True:
        members, end = _members(path, size, file, position, bar, look)
        if _block(file, end) == bytes(_BLOCK):
            yield members
        elif position > 0 and not members:
            logger.warning("%s: the %d bytes after its end mark are not a tar archive", path, size - position)
            return
        else:  # tarfile takes any block that it cannot read for the end
            raise DataError(
                f"{path} is cut short or damaged: no member and no end mark at byte {end} of {size}; "
                "copy or write it again"
            )
        position = _first_used(file, end, size)
        if position >= size:
            return


def _refuse_compressed(path: Place, start: bytes) -> None:
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{path} is compressed with {program}, expected a plain tar; uncompress it first")


def _members(
    path: Place, size: int, file: IO[bytes], position: int, bar: Bar, look: Callable[[Member], None]
) -> tuple[dict[str, Member], int]:
    """The members from a position up to an end mark, and where that is."""
    members: dict[str, Member] = {}
    file.seek(position)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            for member in tar:
                end = member.offset_data + (member.size if member.isreg() else 0)
                name = member.name.removeprefix("./")
                if end > size:
                    raise DataError(
                        f"{path} is cut short: {name} takes bytes {member.offset_data} to {end}, "
                        f"but the file ends at byte {size}; copy or write it again"
                    )
                if name in members:
                    raise DataError(
                        f"{path} holds {name} twice, at bytes {members[name].offset} and {member.offset_data}; names "
                        "inside a tar must be unique: unpack it and pack it again"
                    )
                bar.update(end - position)
                position = end
                if not member.isdir():
                    is_plain = member.isreg() and not member.issparse()
                    members[name] = Member(name, member.offset_data, member.size, is_plain)
                    look(members[name])
            return members, tar.offset
    except tarfile.ReadError as error:
        raise DataError(f"{path}, {size} bytes, is not a tar file or is damaged: {error}") from error


def _block(file: IO[bytes], position: int) -> bytes:
    file.seek(position)
    return file.read(_BLOCK)


def _first_used(file: IO[bytes], position: int, size: int) -> int:
    """Where the first block from `position` on lies that is not all zeros; `size` if there is none."""
    file.seek(position)
    while zeros := file.read(_ZEROS_AT_A_TIME):
        used = len(zeros) - len(zeros.lstrip(b"\0"))
        if used < len(zeros):
            return position + used // _BLOCK * _BLOCK
        position += len(zeros)
    return size
