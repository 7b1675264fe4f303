"""A real run of two workers under Ray, watched by a real Prometheus, and an evaluation of its snapshots meanwhile."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.prometheus import Prometheus, prometheus
from tests.ray_cluster import CHECKOUT, RayCluster, free_port, processes_of_this_block, ray_head, wait_until

_MEASURED = "instdisc_knn_accuracy_ratio and instdisc_snapshot_bytes"


@dataclass(frozen=True)
class WatchedRun:
    """A run under way.

    Attributes:
        directory: Its run directory, named `live`.
        server: Scrapes it every second.
        cluster: Where it runs.
        training: Its driver.
    """

    directory: Path
    server: Prometheus
    cluster: RayCluster
    training: subprocess.Popen[bytes]

    def stop(self) -> None:
        """Stop it as by Ctrl-C, and wait for its end."""
        self.training.send_signal(signal.SIGINT)
        self.training.wait(timeout=120)

    def evaluate(self) -> float:
        """Evaluate its newest snapshot with two actors; the Unix time at which all that it told was last seen."""
        start = time.time()
        command = [
            "-m",
            "instdisc.evaluate",
            str(self.directory),
            "--num-actors",
            "2",
            "--cpus-per-actor",
            "1",
        ]
        done = subprocess.run(
            [sys.executable, *command, "--metrics.port", str(free_port())],
            cwd=CHECKOUT,
            env=os.environ | self.cluster.environment | {"RAY_ADDRESS": self.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        found = self.server.query_range("instdisc_evaluation_knn_top5_ratio", start, time.time(), 0.5)
        assert found, "the accuracy was never scraped"
        return float(found[0]["values"][-1][0])


@contextmanager
def watched_run(folder: Path) -> Iterator[WatchedRun]:
    """Start the server and the run, wait for its first accuracy and snapshot, and end both.

    Args:
        folder: Empty; where the run and the server keep their files.
    """
    run, log = folder / "live", folder / "training.log"
    (run / ".metrics").mkdir(parents=True)
    options = ["--data.path", "sample", "--data.test-path", "sample:test", "--backbone.name", "resnet8"]
    options += ["--training.batch-size", "128", "--training.epochs", "1000", "--knn.every", "1"]
    options += ["--snapshots.every-steps", "60", "--snapshots.keep", "20", "--num-workers", "2"]
    options += ["--cpus-per-worker", "1", "--metrics.port", str(free_port()), "--run-dir", str(run)]
    with (
        ray_head(num_cpus=4) as cluster,
        gpu_exporter() as gpus,
        prometheus(run, folder, ray_directory=cluster.directory, gpus=gpus) as server,
    ):
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        with log.open("w") as output, processes_of_this_block(environment):
            training = subprocess.Popen(
                [sys.executable, "-m", "instdisc.train", "cifar10-npid", *options],
                cwd=CHECKOUT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            wait_until(lambda: training.poll() is not None or bool(server.query(_MEASURED)), timeout_s=300)
            assert training.poll() is None, log.read_text()
            yield WatchedRun(run, server, cluster, training)
        training.wait()


@contextmanager
def gpu_exporter() -> Iterator[str]:
    """The address of a server that says what NVIDIA's dcgm-exporter says of a node with one GPU."""
    said = (Path(__file__).parent / "dcgm.prom").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
