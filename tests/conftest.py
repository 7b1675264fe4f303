"""Fixtures that several packages share, which tests a quick run selects, and what it says at its end."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.debian import not_run
from tests.ray_cluster import RayCluster, ray_head

# One token for every Ray process of the session, from the environment: otherwise Ray writes one into the home
# directory of whoever runs the tests. Set before anything imports Ray, which reads both once.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Started under nohup, the tests and all programs that they start would ignore a terminal that closes.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Marks of the tests that use a fixture; the others carry their marks themselves.
_MARKS = {"ray_cluster": ["ray"], "live": ["ray", "prometheus"], "browse": ["browser"], "endpoint": ["slow"]}
_NOT_QUICK = ("ray", "browser", "prometheus", "slow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"without tests marked {', '.join(_NOT_QUICK)}")


def pytest_configure(config: pytest.Config) -> None:
    """Let a quick test that imports Ray, itself or in a process that it starts, fail."""
    if config.getoption("quick"):
        without_ray = str(Path(__file__).with_name("without_ray"))
        sys.path.insert(0, without_ray)
        paths = [without_ray, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark and select; files that take long come first, so that no worker of pytest-xdist ends long after the other."""
    for item in items:
        for fixture in _MARKS.keys() & getattr(item, "fixturenames", ()):
            for mark in _MARKS[fixture]:
                item.add_marker(mark)
    long = {item for item in items if any(mark.name in _NOT_QUICK for mark in item.iter_markers())}
    files = {item.path for item in long}
    items.sort(key=lambda item: item.path not in files)
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Say in the last line what was not run for want of a package."""
    yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:  # a worker of pytest-xdist has none
        line = not_run(report.longrepr[2] for report in terminal.stats.get("skipped", []))
        if line:
            terminal.write_line(line, yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small matrices take many times as long when threads of two processes wait for one another on two cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray head node with 2 CPUs, a dashboard and token authentication, shared by all tests of a file.

    Not of the session: its log monitor alone, idle, takes a twentieth of a core.

    In the test process, or in one that it starts with `env=os.environ | ray_cluster.environment`, point Ray to it:

        monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
        launch(function, payload, LaunchConfig(), name="test", storage=tmp_path)

    As a user does from another machine (the job sees a copy of the checkout, so paths must be absolute):

        job = ray_cluster.submit("python", "-m", "instdisc.train", "sample", "--output", str(tmp_path))
        assert job.returncode == 0, job.stdout
    """
    with ray_head(num_cpus=2) as cluster:
        yield cluster
