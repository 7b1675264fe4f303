"""An S3 server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import s3fs

# Takes a port that is free at that moment, says which, and serves until its input ends.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server on a port of the loopback that it chose itself; its URL."""
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url, "the server ended before it served"
            yield url
        finally:
            s3fs.S3FileSystem.clear_instance_cache()  # which would ask this server for files of the next one
            server.terminate()


def s3_bucket(endpoint: str, name: str, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """A file system with a bucket; the environment points to it, as a user's would."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = s3fs.S3FileSystem(use_listings_cache=False)
    if not system.exists(name):
        system.mkdir(name)
    return system
