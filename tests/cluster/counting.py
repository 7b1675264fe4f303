"""A worker function whose state is one number in a file, nodes to run it on, and a program that launches it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.group import Worker
from cluster.launch import launch
from cluster.settings import LaunchConfig
from cluster.stopping import RunStopped, Stopped
from tests.ray_cluster import CHECKOUT, RayCluster, processes_of_this_block, wait_until


@dataclass(frozen=True)
class Count:
    """A count in a directory, and who worked on it.

    Attributes:
        directory: Which all workers see.
    """

    directory: Path

    @property
    def value(self) -> int:
        """The number as last saved."""
        file = self.directory / "count"
        return int(file.read_text()) if file.exists() else 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        """For every group that worked on it: the number it began with, and its workers."""
        return [json.loads(file.read_text()) for file in sorted(self.directory.glob("group-*"))]

    def save(self, value: int) -> None:
        """Replace the number."""
        _write(self.directory / "count", str(value))

    def enough(self) -> None:
        """End the counting."""
        (self.directory / "enough").touch()

    def wait_for_group(self, index: int) -> dict[str, Any]:
        """Return group number `index` once it has counted."""
        wait_until(
            lambda: len(self.groups) > index and self.value > self.groups[index]["begin"], timeout_s=180
        )
        return self.groups[index]


def count(worker: Worker, job: Count) -> int | Stopped:
    """Count on until told that it is enough; save every number."""
    value = job.value
    me = {"pid": os.getpid(), "node": os.environ.get("INSTDISC_TEST_NODE"), "node_id": _node_id()}
    workers: list[Any] = [me] * worker.world_size
    if worker.world_size > 1:
        dist.all_gather_object(workers, me)
    if worker.is_rank_zero:
        group = {"begin": value, "workers": workers, "time": time.time(), "restarts": worker.restarts}
        _write(job.directory / f"group-{len(job.groups):03}", json.dumps(group))
    while True:
        asked = [worker.stop_requested(), (job.directory / "enough").exists()]
        if worker.world_size > 1:
            dist.broadcast_object_list(asked)
        reason, enough = asked
        if reason:
            return Stopped(str(reason), f"number {value}")
        if enough:
            return value
        time.sleep(0.05)
        value += 1
        if worker.is_rank_zero:
            job.save(value)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def _node_id() -> str | None:
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().get_node_id())


@dataclass(frozen=True)
class RayNode:
    """A node that joined a cluster.

    Attributes:
        ip: Its address, which `count` notes of the workers there.
        pids: Lists its processes.
    """

    ip: str
    pids: Callable[[], list[int]]

    def kill(self) -> None:
        """End it as a power cut does."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def ray_node(
    cluster: RayCluster, ip: str, num_cpus: int = 1, *, inside: Sequence[str] = ()
) -> Iterator[RayNode]:
    """Start a node at an address, and end it with all it started; `inside` as in `ray_head`.

    It has a temporary directory of its own: in a common one the nodes remove each other's copies of a job's directory.
    """
    environment = cluster.environment | {"INSTDISC_TEST_NODE": ip}
    command = [
        *(
            *inside,
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            f"--address={cluster.address}",
        ),
        *(f"--node-ip-address={ip}", f"--num-cpus={num_cpus}", "--disable-usage-stats"),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory,
        processes_of_this_block(environment) as alive,
    ):
        command.append(f"--temp-dir={directory}")
        node = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert node.stdout is not None
        said = []
        for line in node.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        assert node.poll() is None, "".join(said)
        try:
            yield RayNode(ip, alive)
        finally:
            for pid in alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()


@contextmanager
def counting_program(
    job: Count, config: dict[str, Any], environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m tests.cluster.counting` in a process group of its own, and end it with all it started."""
    marked = dict(environment)
    with processes_of_this_block(marked):
        yield subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.counting", str(job.directory), json.dumps(config)],
            cwd=CHECKOUT,
            env=os.environ | marked,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def main(directory: str, config: str) -> int:
    """Count in a directory, and say how it ended.

    Args:
        directory: Of the `Count`.
        config: The fields of a `LaunchConfig` in JSON.
    """
    logging.basicConfig(format="%(message)s")
    job = Count(Path(directory))
    try:
        value = launch(count, job, LaunchConfig(**json.loads(config)), name="count", storage=job.directory)
    except RunStopped as stopped:
        print(stopped)
        return 130
    print("counted to", value)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
