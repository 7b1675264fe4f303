"""What a stop costs: trainings stopped at random moments, in every way that one machine can show.

    python -m benchmarks.stops KIND … [--repeats 5] [--seed 0] [--jsonl FILE]

KIND is one of those below, or `table` to print what the file holds. A head without CPUs and nodes of one CPU at
127.0.0.2, .3 and so on train the sample with two workers, ResNet-8, a snapshot every 200 steps, the accuracy measured
every other epoch (78 steps). A stop comes 0 to 8 seconds after the first new step. Steps lost are those that were done
(every one is in `metrics.jsonl`) and that the next start does not resume from. Storage is the local disk; for
`job-stop-slow` an S3 server on which every file takes 2 seconds. All processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.snapshots import newest_step, steps
from cluster.storage import Storage
from instdisc.common.files import read_lines
from tests.cluster.counting import RayNode, ray_node
from tests.ray_cluster import CHECKOUT, RayCluster, free_port, ray_head, wait_until

RAY = str(Path(sys.executable).parent / "ray")
EVERY_STEPS = 200
OPTIONS = ["--num-workers", "2", "--cpus-per-worker", "1", "--max-restarts", "99", "--knn.no-baselines"]
OPTIONS += ["--training.epochs", "1000", "--training.log-every", "1", "--knn.every", "2"]
OPTIONS += ["--snapshots.every-steps", str(EVERY_STEPS)]
SLOW_S = 2.0
LATEST_S = 8.0


@dataclass(frozen=True)
class Stop:
    """One stop.

    Attributes:
        kind: How.
        done: Steps done when it came.
        lost: Steps that have to be done again.
        seconds: Until the command had ended, or where the run continues by itself until its next step.
        status: Exit status of the command; None where the run continues.
        left: What was left behind: files for Prometheus, the lease, unfinished snapshots, worker processes.
    """

    kind: str
    done: int
    lost: int
    seconds: float
    status: int | None
    left: tuple[str, ...]


class Training:
    """A run on a cluster, which is started again and again."""

    def __init__(self, cluster: RayCluster, directory: Path, url: str | None) -> None:
        self.cluster, self.run = cluster, directory / "run"
        self.url = url or str(self.run / "snapshots")
        self.nodes: list[RayNode] = []
        self.command = ["python", "-m", "instdisc.train", "sample", "--run-dir", str(self.run), *OPTIONS]
        self.command += ["--data.root", str(directory), "--metrics.port", str(free_port())]
        self.command += ["--snapshots.url", url] if url else []

    @property
    def done(self) -> int:
        """The newest step in the metrics file."""
        rows = read_lines(self.run / "metrics.jsonl")
        return max((row["step"] for row in rows if row["kind"] == "train"), default=0)

    @property
    def saved(self) -> int:
        """The step that the next start resumes from."""
        return newest_step(self.url) or 0

    @contextmanager
    def command_line(self) -> Iterator[subprocess.Popen[str]]:
        """The command, typed at a terminal that is connected to the cluster, once it has done new steps."""
        saved = self.saved
        with tempfile.TemporaryFile("w+") as output:
            program = subprocess.Popen(
                [sys.executable, *self.command[1:]],
                cwd=CHECKOUT,
                env=os.environ | self.cluster.environment | {"RAY_ADDRESS": self.cluster.address},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                wait_until(lambda: program.poll() is not None or self.done > saved, timeout_s=300)
                if program.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(output.read())
                yield program
            finally:
                program.kill()
                program.wait()

    def workers(self) -> list[int]:
        """Process ids of the workers on all nodes."""
        return [
            pid
            for node in self.nodes
            for pid in node.pids()
            if _command_line(pid).startswith(b"ray::RayTrainWorker")
        ]

    def left(self) -> tuple[str, ...]:
        """What a run that has ended left behind, ten seconds later at most."""
        end = time.monotonic() + 10
        while self.workers() and time.monotonic() < end:
            time.sleep(0.2)
        storage = Storage.at(self.url)
        unfinished = [step for step in steps(storage) if step > self.saved]
        found = {
            "targets": len(list((self.run / ".metrics").glob("*.json"))),
            "lease": len(list(self.run.glob(".lease"))) + ("://" in self.url and storage.exists("LEASE")),
            "unfinished snapshot": len(unfinished),
            "workers": len(self.workers()),
        }
        return tuple(name for name, count in found.items() if count)

    def stopped(self, kind: str, begun: float, status: int) -> Stop:
        """What a stop that began at a time of `time.monotonic()` has cost, once the command has ended."""
        seconds = time.monotonic() - begun
        left, done = self.left(), self.done
        return Stop(kind, done, done - self.saved, seconds, status, left)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def random_moment() -> None:
    time.sleep(random.uniform(0, LATEST_S))


def signalled(training: Training, kind: str, number: signal.Signals, *, group: bool) -> Stop:
    """A signal to the command, or as Ctrl-C at a terminal to all processes that it started as well."""
    with training.command_line() as program:
        random_moment()
        begun = time.monotonic()
        os.killpg(program.pid, number) if group else program.send_signal(number)
        status = program.wait()
        return training.stopped(kind, begun, status)


def job_stopped(training: Training, kind: str) -> Stop:
    """`ray job submit` and `ray job stop` as the documents have them."""
    environment = os.environ | training.cluster.environment
    saved, submission = training.saved, f"stops-{secrets.token_hex(4)}"
    address = ["--address", training.cluster.dashboard]
    submit = [
        RAY,
        "job",
        "submit",
        *address,
        "--no-wait",
        "--submission-id",
        submission,
        "--working-dir",
        ".",
    ]
    quiet: dict[str, Any] = {"cwd": CHECKOUT, "env": environment, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*submit, "--", *training.command], **quiet, stderr=subprocess.DEVNULL)
    wait_until(lambda: training.done > saved, timeout_s=400)
    random_moment()
    begun = time.monotonic()
    subprocess.run([RAY, "job", "stop", *address, submission], **quiet)
    return training.stopped(kind, begun, 0)


def continued(training: Training, kind: str, hit: Callable[[], None]) -> Stop:
    """A fault after which the running command continues by itself."""
    random_moment()
    begun, done = time.monotonic(), training.done
    hit()
    before = len(resumed_from(training))
    while len(resumed_from(training)) == before:
        done = max(done, training.done)
        time.sleep(0.02)
    start = resumed_from(training)[-1]
    wait_until(lambda: training.done > start, timeout_s=300)
    return Stop(kind, done, max(done - start, 0), time.monotonic() - begun, None, ())


def resumed_from(training: Training) -> list[int]:
    """The steps that the groups so far resumed from."""
    said = [row["message"] for row in read_lines(training.run / "metrics.jsonl") if row["kind"] == "status"]
    found = [
        re.match(r"(?:resuming from the snapshot of step (\d+)|starting from the)", text) for text in said
    ]
    return [int(each[1] or 0) for each in found if each]


def faults(training: Training, kind: str, repeats: int, add_node: Callable[[], None]) -> Iterator[Stop]:
    """Faults of one command that runs on; every node that is lost is replaced beforehand by a free one."""
    if kind in ("drain", "kill-node"):
        add_node()
    with training.command_line() as program:
        for _ in range(repeats):
            victim = random.choice([node for node in training.nodes if _works(training, node)])
            if kind == "kill-worker":
                (pid,) = (pid for pid in victim.pids() if pid in training.workers())
                yield continued(training, kind, lambda pid=pid: os.kill(pid, signal.SIGKILL))
                continue
            yield continued(
                training,
                kind,
                victim.kill if kind == "kill-node" else lambda node=victim: drain(training, node),
            )
            training.nodes.remove(victim)
            victim.kill()
            add_node()
        program.send_signal(signal.SIGTERM)
        program.wait()


def _works(training: Training, node: RayNode) -> bool:
    return bool(set(node.pids()) & set(training.workers()))


def drain(training: Training, node: RayNode) -> None:
    """Tell the cluster that the node will be taken away in two minutes."""
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import ray, json; ray.init(logging_level='ERROR'); print(json.dumps(ray.nodes()))",
        ],
        env=os.environ | training.cluster.environment | {"RAY_ADDRESS": training.cluster.address},
        check=True,
        capture_output=True,
        text=True,
    )
    nodes = json.loads(listed.stdout.splitlines()[-1])
    (found,) = (each["NodeID"] for each in nodes if each["NodeManagerAddress"] == node.ip and each["Alive"])
    command = [RAY, "drain-node", f"--address={training.cluster.address}", f"--node-id={found}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=benchmark"]
    command += ["--deadline-remaining-seconds=120"]
    subprocess.run(
        command, env=os.environ | training.cluster.environment, check=True, stdout=subprocess.DEVNULL
    )


KINDS = ("ctrl-c", "sigterm", "job-stop", "job-stop-slow", "drain", "kill-worker", "kill-node", "kill-driver")


def measure(kind: str, repeats: int) -> Iterator[Stop]:
    """So many stops of a kind, on a cluster and a run of their own."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stops")))
        url = stack.enter_context(slow_bucket()) if kind == "job-stop-slow" else None
        training = Training(stack.enter_context(ray_head(num_cpus=0)), directory, url)

        def add_node() -> None:
            ip = f"127.0.0.{next(numbers)}"
            training.nodes.append(stack.enter_context(ray_node(training.cluster, ip)))

        numbers = iter(range(2, 250))
        add_node()
        add_node()
        if kind in ("drain", "kill-worker", "kill-node"):
            yield from faults(training, kind, repeats, add_node)
            return
        for _ in range(repeats):
            if kind.startswith("job-stop"):
                yield job_stopped(training, kind)
            else:
                number = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}.get(kind, signal.SIGKILL)
                yield signalled(training, kind, number, group=kind == "ctrl-c")


@contextmanager
def slow_bucket() -> Iterator[str]:
    """An S3 server of this process, slow to write; the environment names it, as a user's would."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def slowly(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1:
            time.sleep(SLOW_S)
        return application(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server("127.0.0.1", free_port(), slowly, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import s3fs

    s3fs.S3FileSystem().mkdir("runs")
    yield "s3://runs/stopped"
    server.shutdown()


def table(stops: list[dict[str, Any]]) -> str:
    """Markdown, a row per kind."""
    lines = [
        "| stop | times | steps lost: median, most | seconds: median, most | exit status | left behind |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for kind in KINDS:
        rows = [stop for stop in stops if stop["kind"] == kind]
        if rows:
            lost, seconds = ([row[name] for row in rows] for name in ("lost", "seconds"))
            statuses = sorted(
                {str(row["status"]) if row["status"] is not None else "continues" for row in rows}
            )
            left = sorted({name for row in rows for name in row["left"]})
            lines.append(
                f"| {kind} | {len(rows)} | {statistics.median(lost):g}, {max(lost)} | "
                f"{statistics.median(seconds):.1f}, {max(seconds):.1f} | {', '.join(statuses)} | "
                f"{', '.join(left) or 'nothing'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "table"], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--jsonl", type=Path, help="a line for every stop is added to this file")
    arguments = parser.parse_args()
    if arguments.kinds == ["table"]:
        print(table(read_lines(arguments.jsonl)))
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    random.seed(arguments.seed)
    for kind in arguments.kinds:
        for stop in measure(kind, arguments.repeats):
            line = json.dumps(asdict(stop))
            print(line, flush=True)
            if arguments.jsonl:
                with arguments.jsonl.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
