"""A cluster of three nodes on one machine: training across two of them, then an evaluation.

    python -m tests.e2e.three_nodes RUN_DIR [--namespaces] [--fault kill|cut] [OPTION of instdisc.train …]

A head without work and two nodes of one CPU each, at 127.0.0.1 to 3, or with `--namespaces` (as root) each in a network
namespace of its own, joined by a bridge. Both jobs are submitted as to any cluster. A fault hits the last node as soon
as a snapshot is committed: `kill` ends its processes, `cut` its link. Ends what it started.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SnapshotError
from cluster.snapshots import newest_step
from tests.cluster.counting import RayNode, ray_node
from tests.ray_cluster import RayCluster, ray_head, wait_until

TRAIN = ["--num-workers", "2", "--min-workers", "1", "--cpus-per-worker", "1", "--strategy", "STRICT_SPREAD"]
TRAIN += ["--max-restarts", "3", "--collective-timeout-s", "30"]


@dataclass(frozen=True)
class Place:
    """Where a node runs.

    Attributes:
        ip: Its address.
        inside: What a command line has to begin with to run there.
        link: The end of its network cable, if it has one.
    """

    ip: str
    inside: tuple[str, ...] = ()
    link: str | None = None

    def cut(self) -> None:
        """Pull the cable."""
        assert self.link is not None, "only nodes in namespaces have a link"
        _ip("link", "set", self.link, "down")


@contextmanager
def namespaces(count: int) -> Iterator[list[Place]]:
    """Network namespaces joined by a bridge, to which this process has access too. Needs root and iproute2."""
    mark = f"id{secrets.token_hex(2)}"
    subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
    with ExitStack() as made:
        _ip("link", "add", mark, "type", "bridge")
        made.callback(_ip, "link", "del", mark)
        _ip("addr", "add", f"{subnet}.254/24", "dev", mark)
        _ip("link", "set", mark, "up")
        places = []
        for number in range(1, count + 1):
            name, ip = f"{mark}{number}", f"{subnet}.{number}"
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "del", name)
            _ip("link", "add", f"{name}o", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}o", "master", mark, "up")
            for command in (("link", "set", "lo", "up"), ("link", "set", "eth0", "up")):
                _ip("-n", name, *command)
            _ip("-n", name, "addr", "add", f"{ip}/24", "dev", "eth0")
            places.append(Place(ip, ("ip", "netns", "exec", name), f"{name}o"))
        yield places


def namespaces_permitted() -> bool:
    """Whether `namespaces` works here."""
    try:
        with namespaces(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def three_nodes(places: list[Place]) -> Iterator[tuple[RayCluster, list[RayNode]]]:
    """A head without CPUs at the first place, nodes with one CPU at the others."""
    head, *others = places
    with ExitStack() as stack:
        cluster = stack.enter_context(ray_head(num_cpus=0, ip=head.ip, inside=head.inside))
        nodes = [stack.enter_context(ray_node(cluster, place.ip, inside=place.inside)) for place in others]
        yield cluster, nodes


def has_snapshot(run: Path) -> bool:
    with suppress(SnapshotError):
        return bool(newest_step(run / "snapshots"))
    return False


def train(cluster: RayCluster, run: Path, options: list[str]) -> subprocess.Popen[str]:
    """Submit the training job; its output is that of the process."""
    command = [
        "python",
        "-m",
        "instdisc.train",
        "sample",
        "--run-dir",
        str(run),
        "--data.root",
        str(run.parent),
    ]
    return cluster.submitting(*command, *TRAIN, *options)


def evaluate(cluster: RayCluster, run: Path, num_actors: int = 2) -> dict[str, float]:
    """Submit the evaluation job; its accuracies."""
    actors = ["--num-actors", str(num_actors), "--cpus-per-actor", "1"]
    job = cluster.submit("python", "-m", "instdisc.evaluate", str(run), *actors)
    assert job.returncode == 0, job.stdout
    (found,) = (run / "evaluation").glob("*/knn.json")
    accuracies: dict[str, float] = json.loads(found.read_text())["accuracies"]["k200"]
    return accuracies


def main() -> int:
    """Train, hit a node if asked to, evaluate; print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory; must not hold a run")
    parser.add_argument("--namespaces", action="store_true", help="a network namespace for every node")
    parser.add_argument("--fault", choices=("kill", "cut"), help="what happens to the last node")
    arguments, options = parser.parse_known_args()
    if arguments.fault == "cut" and not arguments.namespaces:
        parser.error("--fault cut needs --namespaces: only nodes in namespaces have a link")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    run = arguments.run.absolute()
    with ExitStack() as stack:
        if arguments.namespaces:
            places = stack.enter_context(namespaces(3))
        else:
            places = [Place(f"127.0.0.{number}") for number in (1, 2, 3)]
        cluster, nodes = stack.enter_context(three_nodes(places))
        print("nodes at", ", ".join(place.ip for place in places), flush=True)
        program = train(cluster, run, options)
        if arguments.fault:
            wait_until(lambda: program.poll() is not None or has_snapshot(run), timeout_s=600)
            nodes[-1].kill() if arguments.fault == "kill" else places[-1].cut()
            print(f"{arguments.fault} {places[-1].ip} at {time.strftime('%H:%M:%S')}", flush=True)
        print(program.communicate()[0])
        if program.returncode == 0:
            print("evaluation:", evaluate(cluster, run, num_actors=1 if arguments.fault else 2))
    return program.returncode


if __name__ == "__main__":
    sys.exit(main())
