import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.strings import StringTable, printable, unprinted


@given(st.lists(st.text()))
def test_holds_the_strings_in_order(strings: list[str]) -> None:
    table = StringTable.of(strings)
    assert list(table) == strings
    assert [table[index] for index in range(len(table))] == strings
    assert table.blob.dtype == np.uint8
    assert table.bounds.dtype == np.int64


@given(st.data())
def test_takes_rows_in_any_order_and_repeatedly(data: st.DataObject) -> None:
    strings = data.draw(st.lists(st.text(), min_size=1))
    rows = data.draw(st.lists(st.integers(0, len(strings) - 1)))
    assert list(StringTable.of(strings).take(np.array(rows, np.int64))) == [strings[row] for row in rows]


def test_counts_from_the_end_and_refuses_what_is_beyond() -> None:
    table = StringTable.of(["a", "", "ccc"])
    assert table[-1] == "ccc"
    for index in (3, -4):
        with pytest.raises(IndexError, match="table of 3"):
            table[index]


def test_keeps_file_names_that_are_not_utf8() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert StringTable.of([name])[0] == name


@given(st.lists(st.text()))
def test_shares_its_memory_with_arrow(strings: list[str]) -> None:
    table = StringTable.of(strings)
    array = table.to_arrow()
    assert array.to_pylist() == [string.encode() for string in strings]
    again = StringTable.of_arrow(array)
    assert list(again) == strings
    assert again.bounds.ctypes.data == table.bounds.ctypes.data


def test_names_are_printed_on_one_line_and_stay_different() -> None:
    names = [
        b"caf\xe9",
        b"caf\\xe9",
        b"a\nb",
        b"a\\nb",
        "é\u0085\u202e".encode(),
        b"\xc2\xa0",
        b"\x85",
        b"a b",
    ]
    texts = [printable(os.fsdecode(name)) for name in names]
    assert texts[:4] == ["caf\\xe9", "caf\\\\xe9", "a\\nb", "a\\\\nb"]
    assert texts[4:] == ["é\\u0085\\u202e", "\u00a0", "\\x85", "a b"]
    assert all(len(text.encode().splitlines()) == 1 for text in texts)


@given(st.binary())
def test_a_printed_name_is_read_back(name: bytes) -> None:
    decoded = os.fsdecode(name)
    assert unprinted(printable(decoded)) == decoded
