"""The files of a run that someone damaged: one plain error, or what can still be read of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instdisc.common.errors import ConfigError
from instdisc.common.files import write_text
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.recipes import RECIPES
from instdisc.settings.schema import from_json, to_json

_STORED: dict[str, Any] = json.loads(json.dumps(to_json(RECIPES["sample"].config, "sample", "a1")))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"\xff\xfe\x00",
        b"{}",
        b'{"snapshots": null}',
        json.dumps({**_STORED, "training": []}).encode(),
        json.dumps({**_STORED, "snapshots": {}}).encode(),
        json.dumps({**_STORED, "recipe": None}).encode(),
        json.dumps({**_STORED, "schema": "two"}).encode(),
        json.dumps({**_STORED, "schema": None}).encode(),
        json.dumps({**_STORED, "knn": 5}).encode(),
        json.dumps({**_STORED, "run_dir": {}}).encode(),
    ],
)
def test_settings_that_cannot_be_read_are_refused_with_the_name_of_the_file(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        RunDirectory(tmp_path).stored_config()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_told_at_once(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    for name in ("config.json", "summary.json", "images.json"):
        make(tmp_path / name)
    run = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read: .*config\.json"):
        run.stored_config()
    assert run.read_summary(4) is None
    assert run.unchanged_images("a") is None


def test_whole_settings_are_read() -> None:
    config = RECIPES["sample"].config
    assert from_json(_STORED, "here").settings() == dataclasses.replace(config).settings()


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b"\xff\xfe\x00", b'{"epochs": 4'])
def test_a_damaged_summary_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    assert RunDirectory(tmp_path).read_summary(4) is None


def test_damaged_lines_of_the_journal_are_passed_over(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    whole = [{"kind": "train", "step": 3}, {"kind": "knn", "epoch": 1.0, "knn_top1": 0.5}]
    lines = [json.dumps(each).encode() for each in whole]
    damaged = [b"\xff\xfe\x00garbage", b"null", b"[1]", b"{}", b"7", b'{"kind": "tr', b"[" * 100_000]
    run.journal.write_bytes(b"\n".join([*damaged, lines[0], *damaged, lines[1], b""]))
    assert run.measurements() == [whole[1]]
    assert run.has_accuracy(1)
    assert run.baselines() == {}
    assert run.label_free() == []
    run.rewind_journal(step=4, steps_per_epoch=4)
    assert run.journal.read_bytes().splitlines() == lines
    run.corrupt_images.write_bytes(b"\n".join([*damaged, b'{"name": "a.png"}', b""]))
    assert run.count_corrupt_images() == 1


def test_a_text_with_a_name_that_is_not_utf8_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "<h1>" + os.fsdecode(b"r\xe9sum") + "</h1>")
    assert (tmp_path / "page.html").read_text() == "<h1>r\\udce9sum</h1>"
