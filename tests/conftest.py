"""Fixtures that several packages share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.ray_cluster import RayCluster, ray_head

# One token for every Ray process of the session, from the environment: otherwise Ray writes one into the home
# directory of whoever runs the tests. Set before anything imports Ray, which reads both once.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray head node with 2 CPUs, a dashboard and token authentication, shared by all tests of the session.

    In the test process, or in one that it starts with `env=os.environ | ray_cluster.environment`, point Ray to it:

        monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
        launch(function, payload, LaunchConfig(), name="test", storage=tmp_path)

    As a user does from another machine (the job sees a copy of the checkout, so paths must be absolute):

        job = ray_cluster.submit("python", "-m", "instdisc.train", "sample", "--output", str(tmp_path))
        assert job.returncode == 0, job.stdout
    """
    with ray_head(num_cpus=2) as cluster:
        yield cluster
