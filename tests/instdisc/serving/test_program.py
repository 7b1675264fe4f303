"""The program: on Ray Serve from start to end, and what it refuses before."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instdisc.serve import main
from instdisc.serving.access import read_token
from instdisc.settings.serve import ServeConfig
from tests.instdisc.serving.conftest import TOKEN
from tests.ray_cluster import CHECKOUT, RayCluster, free_port


def fetch(url: str, body: Any = None) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return json.load(answer)


def answer(url: str, body: Any) -> Any:
    """What is fetched, None for 503."""
    try:
        return fetch(url, body)
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise


@contextmanager
def serving(index: Path, environment: dict[str, str], *options: str) -> Iterator[tuple[Any, str]]:
    """The program, once it says that it serves; yields it and its address."""
    port = free_port()
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "instdisc.serve",
            str(index),
            "--port",
            str(port),
            "--metrics.port",
            "0",
            *options,
        ],
        cwd=CHECKOUT,
        env=os.environ | environment | {"INSTDISC_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        try:
            line = program.stdout.readline()
            assert line.startswith("serving "), (line, program.communicate()[1])
            yield program, f"http://127.0.0.1:{port}"
        finally:
            program.kill()


def actors_of(cluster: RayCluster) -> list[dict[str, Any]]:
    """The processes that hold rows, as the dashboard lists them."""
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    url = f"{cluster.dashboard}/api/v0/actors?detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        listed = json.load(answer)["data"]["result"]["result"]
    return [each for each in listed if each["class_name"] == "_Holder"]


def test_it_serves_from_actors_until_it_is_stopped(served_index: Path, ray_cluster: RayCluster) -> None:
    """One that is killed comes back with its rows, and no answer is of a part of the rows meanwhile."""
    environment = ray_cluster.environment | {"RAY_ADDRESS": ray_cluster.address}
    with serving(served_index, environment, "--num-actors", "1", "--cpus-per-actor", "1") as (program, url):
        before = fetch(f"{url}/search?k=4", {"key": "red/3.png"})
        assert len(before["neighbors"]) == 4
        assert fetch(f"{url}/index")["rows"] == 32
        (holder,) = actors_of(ray_cluster)
        os.kill(holder["pid"], signal.SIGKILL)
        while (after := answer(f"{url}/search?k=4", {"key": "red/3.png"})) is None:
            time.sleep(0.1)
        assert after == before
        assert [each["pid"] for each in actors_of(ray_cluster)] != [holder["pid"]]
        program.terminate()
        said, errors = program.communicate(timeout=60)
        assert program.returncode == 0, errors
        assert said.splitlines()[-1] == "stopped"
        assert "Traceback" not in errors
        with pytest.raises(urllib.error.URLError):
            fetch(f"{url}/health")


def test_a_port_that_is_taken(served_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([str(served_index), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


def test_what_is_no_index(served_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = next(path for path in served_index.parent.rglob("config.json")).parent
    assert main([str(run)]) == 2
    assert "is no index: make one with python -m instdisc.embed" in capsys.readouterr().err


def test_other_machines_need_a_token(
    served_index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSTDISC_TOKEN", raising=False)
    assert main([str(served_index), "--host", "0.0.0.0"]) == 2
    assert "need a token" in capsys.readouterr().err


@pytest.fixture
def token_of(tmp_path: Path) -> Callable[..., bytes | None]:
    def token_of(content: bytes | None, mode: int = 0o600) -> bytes | None:
        file = tmp_path / "token"
        if content is not None:
            file.write_bytes(content)
            file.chmod(mode)
        return read_token(ServeConfig(index="index", token_file=file))

    return token_of


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "cannot be read"),
        (b"0123456789abcdef", 0o644, "by everybody: chmod 600"),
        (b"short\n", 0o600, "has 5 characters"),
        (b"\xff" * 20, 0o600, "cannot be read"),
    ],
)
def test_tokens_that_are_refused(
    token_of: Callable[..., bytes | None], content: bytes | None, mode: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        token_of(content, mode)


def test_a_token_of_a_file_is_that_of_the_environment(
    token_of: Callable[..., bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTDISC_TOKEN", TOKEN)
    assert token_of(TOKEN.encode() + b"\n") == read_token(ServeConfig(index="index"))
    monkeypatch.delenv("INSTDISC_TOKEN")
    assert read_token(ServeConfig(index="index")) is None
