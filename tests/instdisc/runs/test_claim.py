"""One run at a time in a run directory and in a directory of snapshots, also where the file system has no locks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import lease
from cluster.lease import Holder, Lease
from cluster.stopping import signals_as_interrupt
from cluster.storage import Storage
from instdisc.common.errors import ConfigError
from instdisc.runs.claim import claim, claim_snapshots
from instdisc.runs.run_directory import RunDirectory


@pytest.fixture(params=["locks", "no locks", "locked by a dead node"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    number = {"no locks": errno.ENOLCK, "locked by a dead node": errno.EWOULDBLOCK}.get(request.param)

    def refuse(*_: object) -> None:
        raise OSError(number, "")

    if number is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return RunDirectory(tmp_path / "run")


@contextmanager
def held(path: Path, name: str) -> Iterator[None]:
    other = Lease(Storage.at(path), name, lambda holder: None)
    other.acquire(settle=False)
    try:
        yield
    finally:
        other.release()


def write_lease_of_another_node(run: RunDirectory) -> None:
    run.path.mkdir(exist_ok=True)
    holder = dataclasses.replace(Holder.this_process(), host="node7", process="another 1", token="theirs")
    (run.path / ".lease").write_text(json.dumps(dataclasses.asdict(holder)))


def test_a_second_run_is_told_who_is_there(run: RunDirectory) -> None:
    with (
        held(run.path, ".lease"),
        pytest.raises(
            ConfigError, match=rf"another run is writing to .*run \(process {os.getpid()} on .*, since"
        ),
        claim(run),
    ):
        pass


def test_a_second_run_with_the_same_snapshots_is_told_who_is_there(tmp_path: Path) -> None:
    url = str(tmp_path / "snapshots")
    with (
        claim_snapshots(url),
        pytest.raises(ConfigError, match=rf"writing to {url} \(process {os.getpid()} on"),
        claim_snapshots(url),
    ):
        pass
    with claim_snapshots(url):
        pass


def test_a_run_whose_node_died_holds_nothing_for_long(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LAPSE_S", 1.5)
    write_lease_of_another_node(run)
    with claim(run):
        assert "waiting up to 1.5 s to see whether who holds it is alive (process" in caplog.text
        assert "on node7, since" in caplog.text


def test_a_run_that_was_taken_over_ends(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    run.path.mkdir()
    if fcntl.flock.__name__ == "refuse":
        write_lease_of_another_node(run)
        monkeypatch.setattr(lease, "LAPSE_S", 0.5)

    def train_until_taken_over() -> None:
        with signals_as_interrupt(), claim(run):
            write_lease_of_another_node(run)
            time.sleep(60)

    with pytest.raises(ConfigError, match=r"another run has taken .* \(process \d+ on node7"):
        train_until_taken_over()
    assert "theirs" in (run.path / ".lease").read_text()
