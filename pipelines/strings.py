"""Many strings in two arrays, so that a billion of them can be memory-mapped instead of held as objects."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# File names that are not UTF-8 survive the round trip, as in os.fsencode.
_ERRORS = "surrogateescape"
# Controls, marks that reorder what a terminal shows, bytes that are no UTF-8, and the backslash that escapes them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_ESCAPED = re.compile(r"\\(?:([nrt\\])|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def printable(name: str) -> str:
    r"""Escape a file name for screens, JSON and tables: one line of UTF-8 text, different for different bytes.

    Bytes that are not UTF-8 are written `\xe9`, a newline `\n`, a backslash twice.
    """
    return _UNPRINTABLE.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` keeps it
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode() if code < 0x80 else f"\\u{code:04x}"


def unprinted(text: str) -> str:
    """The file name that `printable` made `text` of."""
    return _ESCAPED.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    kind, digits = match[1], match[2] or match[3]
    if kind:
        return {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[kind]
    code = int(digits, 16)
    return chr(code + 0xDC00 if len(digits) == 2 and code >= 0x80 else code)


@dataclass(frozen=True, eq=False)
class StringTable:
    """An immutable list of strings.

    Attributes:
        blob: uint8 (total bytes,), the UTF-8 texts one after the other.
        bounds: int64 (n + 1,), ascending; string `i` is `blob[bounds[i]:bounds[i + 1]]`.
    """

    blob: npt.NDArray[np.uint8]
    bounds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> Self:
        """Build the table of `strings`, in their order."""
        encoded = [string.encode("utf-8", _ERRORS) for string in strings]
        bounds = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=bounds[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), bounds)

    @classmethod
    def of_arrow(cls, array: pa.LargeBinaryArray) -> Self:
        """Build the table of an Arrow array that begins with its buffers and has no nulls; shares its memory."""
        _, bounds, blob = array.buffers()
        return cls(np.frombuffer(blob or b"", np.uint8), np.frombuffer(bounds, np.int64, len(array) + 1))

    def to_arrow(self) -> pa.LargeBinaryArray:
        """Return the strings as bytes of UTF-8, or of another encoding where a file name is; shares the memory."""
        buffers = [None, pa.py_buffer(self.bounds), pa.py_buffer(self.blob)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} of a table of {len(self)}")
        index %= len(self)
        return self.blob[self.bounds[index] : self.bounds[index + 1]].tobytes().decode("utf-8", _ERRORS)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Build the table of the strings at `rows`, int64 (m,), each in [0, n), in that order."""
        starts = self.bounds[rows]
        lengths = self.bounds[rows + 1] - starts
        bounds = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        positions = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
        return type(self)(self.blob[positions], bounds)
