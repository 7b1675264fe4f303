"""Leases on a local directory and in a bucket's manner, with holders that are alive, dead, elsewhere or suspended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import lease
from cluster.lease import Holder, Lease, LeaseHeldError, holder_of
from cluster.storage import Storage
from tests.ray_cluster import wait_until

HOLDS = """
import sys, time
from cluster import lease
from cluster.storage import Storage
lease.RENEW_S = 0.2
lease.Lease(Storage.at(sys.argv[1]), "LEASE", lambda holder: None).acquire(settle=False)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "LAPSE_S", 2.0)
    monkeypatch.setattr(lease, "_SETTLE_S", 0.1)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage.at(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


@contextmanager
def holding_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(directory)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def take(storage: Storage, lost: list[Holder] | None = None) -> Lease:
    taken = Lease(storage, "LEASE", (lost if lost is not None else []).append)
    taken.acquire(settle=True)
    return taken


def elsewhere(storage: Storage, renewals: int = 0, clock: float = 0.0) -> Holder:
    """Write the lease of a process on another machine, whose clock is wrong by so many seconds."""
    holder = dataclasses.replace(
        Holder.this_process(),
        host="node7",
        process="another machine 1",
        token="theirs",
        since=time.time() + clock,
    )
    holder = dataclasses.replace(holder, renewals=renewals)
    storage.write("LEASE", json.dumps(dataclasses.asdict(holder)).encode())
    return holder


def test_one_at_a_time_and_the_next_after_it(storage: Storage) -> None:
    first = take(storage)
    with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .*, since 20"):
        take(storage)
    first.release()
    assert holder_of(storage, "LEASE") is None
    take(storage).release()


def test_a_process_killed_on_this_machine_leaves_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LAPSE_S", 1e6)
    with holding_process(tmp_path) as process:
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
            take(Storage.at(tmp_path))
        process.kill()
        wait_until(lambda: _is_dead(process.pid), timeout_s=30)
        take(Storage.at(tmp_path)).release()


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("clock", [-86_400.0, 0.0, 86_400.0])
def test_a_holder_elsewhere_that_renews_no_more_has_lapsed_whatever_its_clock(
    storage: Storage, clock: float
) -> None:
    elsewhere(storage, clock=clock)
    take(storage).release()


@pytest.mark.parametrize("clock", [-86_400.0, 86_400.0])
def test_a_holder_elsewhere_that_renews_is_alive_whatever_its_clock(
    storage: Storage, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LAPSE_S", 600.0)
    elsewhere(storage, clock=clock)
    renewing = threading.Timer(0.5, elsewhere, (storage,), {"renewals": 1, "clock": clock})
    renewing.start()
    with pytest.raises(LeaseHeldError, match="on node7"):
        take(storage)
    renewing.join()


def test_a_damaged_lease_is_none(storage: Storage) -> None:
    storage.write("LEASE", b"{")
    take(storage).release()


def test_of_two_that_take_it_at_once_one_has_it(storage: Storage) -> None:
    start, got = threading.Barrier(2), list[Lease]()

    def contend() -> None:
        start.wait()
        try:
            got.append(take(storage))
        except LeaseHeldError:
            return

    contenders = [threading.Thread(target=contend) for _ in range(2)]
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.join()
    assert len(got) == 1
    got[0].release()


def test_a_holder_that_was_suspended_learns_who_has_it_now(storage: Storage) -> None:
    lost: list[Holder] = []
    mine = take(storage, lost)
    theirs = elsewhere(storage)
    wait_until(lambda: bool(lost), timeout_s=30)
    mine.release()
    assert lost == [theirs]
    assert holder_of(storage, "LEASE") == theirs


def test_a_suspended_process_on_this_machine_is_not_dead(tmp_path: Path) -> None:
    with holding_process(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
            take(Storage.at(tmp_path))
