"""A real Ray cluster for tests: started with `ray start`, found and ended by process id."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
_BIN = Path(sys.executable).parent
_MARK = "INSTDISC_TEST_PROCESSES"
_FIRST_PORT, _PORTS, _PORTS_OF_ONE_TEST = 20_000, 12_000, 20
_FAKE_HEAD = "f" * 51 + "00000"  # as Ray's fake provider calls it
_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


@dataclass(frozen=True)
class RayCluster:
    """A running head node.

    Attributes:
        address: `host:port` for `RAY_ADDRESS`.
        dashboard: URL for `ray job submit --address`.
        directory: Where Ray keeps its files.
        environment: What a process needs to use this cluster, on top of the test's own environment.
    """

    address: str
    dashboard: str
    directory: Path
    environment: dict[str, str]

    def submit(self, *command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit --working-dir <checkout> -- command` and return its exit status and output.

        The job runs in a copy of the checkout: give it absolute paths for all that it shall read or write.
        """
        with self.submitting(*command) as job:
            said, _ = job.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, job.returncode, said)

    def submitting(self, *command: str) -> subprocess.Popen[str]:
        """As `submit`, without waiting for the end."""
        submit = ("job", "submit", "--address", self.dashboard, "--working-dir", str(CHECKOUT), "--")
        return subprocess.Popen(
            [str(_BIN / "ray"), *submit, *command],
            cwd=CHECKOUT,
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def ray_head(
    num_cpus: int, *, ip: str = "127.0.0.1", inside: Sequence[str] = (), grows_to: int = 0
) -> Iterator[RayCluster]:
    """Start a head node with a dashboard, and end it with all it started.

    Args:
        num_cpus: Of the node; 0 for one that only manages the others.
        ip: Its address.
        inside: What its command line has to begin with, for a network namespace.
        grows_to: Nodes of one CPU that Ray's autoscaler adds when they are asked for, at most; one is there from the
            beginning.
    """
    # Not pytest's directory: Ray puts sockets below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        gcs_port, dashboard_port = free_port(), free_port()
        # Workers get the driver's working directory to import from, but not its sys.path.
        environment = {"GLOO_SOCKET_IFNAME": "eth0"} if inside else {}
        environment |= {"PATH": f"{_BIN}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
        command = [
            *(*inside, str(_BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={ip}", f"--dashboard-host={ip}"),
            *(f"--port={gcs_port}", f"--num-cpus={num_cpus}", f"--temp-dir={directory}"),
            *(f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={free_port()}"),
            f"--ray-client-server-port={free_port()}",
        ]
        if grows_to:
            command.append(f"--autoscaling-config={_autoscaling(directory, f'{ip}:{gcs_port}', grows_to)}")
        log = Path(directory, "start.log")
        dashboard = f"http://{ip}:{dashboard_port}"
        with log.open("w") as output, processes_of_this_block(environment):
            # Killed with the rest: on SIGTERM it waits for Ray Train's detached actors, which never end.
            head = subprocess.Popen(
                command,
                env=os.environ | environment | (_AUTOSCALER if grows_to else {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            wait_until(lambda: head.poll() is not None or _answers(f"{dashboard}/api/jobs/"), timeout_s=120)
            assert head.poll() is None, log.read_text()
            yield RayCluster(f"{ip}:{gcs_port}", dashboard, Path(directory), environment)
        head.wait()


def _autoscaling(directory: str, address: str, nodes: int) -> Path:
    """Write the settings of an autoscaler whose nodes are processes on this machine."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0},
        "one-cpu": {"resources": {"CPU": 1}, "min_workers": 1, "max_workers": nodes},
    }
    # As an external one: Ray's package lacks a file that its name alone would read.
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "head_node_id": _FAKE_HEAD, "gcs_address": address}
    settings = {
        "cluster_name": "grows",
        "max_workers": nodes,
        "idle_timeout_minutes": 60,
        "provider": provider | {"launch_multiple": True, "disable_node_updaters": True},
        "auth": {},
        **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "head_node_type": "ray.head.default",
        "available_node_types": {name: kind | {"node_config": {}} for name, kind in kinds.items()},
    }
    path = Path(directory, "autoscaling.yaml")
    path.write_text(json.dumps(settings))
    return path


@contextmanager
def processes_of_this_block(environment: dict[str, str]) -> Iterator[Callable[[], list[int]]]:
    """Mark `environment`, yield a function that lists the processes alive with the mark, and kill those left.

    Ray's processes leave their session and their command line behind, and some overwrite their environment; those are
    found as children of the others.
    """
    mark = secrets.token_hex(8)
    environment[_MARK] = mark
    needle = f"{_MARK}={mark}".encode()

    def alive() -> list[int]:
        found: set[int] = set()
        children: dict[int, list[int]] = defaultdict(list)
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone, or somebody else's
                pid = int(process.name)
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(pid)
                if needle in (process / "environ").read_bytes():
                    found.add(pid)
        unexplored = list(found)
        while unexplored:
            new = [pid for pid in children[unexplored.pop()] if pid not in found]
            found.update(new)
            unexplored += new
        return sorted(found)

    try:
        yield alive
    finally:
        while left := alive():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def killed_at_last(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program in the checkout, its output and errors piped into one; kill it at the end of the block."""
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def free_port() -> int:
    """Return a TCP port that is free, as are usually the next few, and that no other call returns for a long time.

    A port that the system picks may be picked again before it is listened on: by another call, by a test process
    beside this one, or for any connection.
    """
    for port in _candidate_ports():
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the candidates never end")


@functools.cache
def _candidate_ports() -> Iterator[int]:
    """This test process's share of the ports above those of Ray's workers and below those of connections."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = _PORTS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = range(_FIRST_PORT + number * share, _FIRST_PORT + (number + 1) * share, _PORTS_OF_ONE_TEST)
    start = random.SystemRandom().randrange(len(own))  # another session may have left some in use
    return itertools.cycle([*own[start:], *own[:start]])


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Poll until the condition holds; fail after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not so after {timeout_s} s"
        time.sleep(0.2)


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
