"""What a process tells Prometheus: one table of all metrics, and the endpoint that serves them.

Every worker serves its own `/metrics`, the first of a node on the base port, the next ones above it, and writes a file
into the run directory by which Prometheus finds it (`file_sd`). Nothing here stops training: a port that is taken or a
directory that cannot be written to costs the metrics, with one warning.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

logger = logging.getLogger(__name__)

PREFIX = "instdisc_"
LABELS = ("run", "rank")

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SNAPSHOT_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_PORTS_TRIED = 16
_OWN_PORT_S = 5.0
_TRY_EVERY_S = 0.2
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Without the prefix. Base units (seconds, bytes, ratios from 0 to 1); counters end in `_total`.
        kind: Counters and histograms start at 0; a gauge appears when it is first set.
        help: What it means. "Of the run" are numbers that all ranks know and export alike; all others are this rank's.
        buckets: Upper bounds of a histogram.
        since: For an age: the gauge with the Unix time that it counts from.
    """

    name: str
    kind: Literal["histogram", "counter", "gauge"]
    help: str
    buckets: tuple[float, ...] = _STEP_BUCKETS
    since: str | None = None


TRAINING = (
    Metric("step_seconds", "histogram", "A whole step, from asking for a batch to the bank's update."),
    Metric("data_wait_seconds", "histogram", "Waiting for the batch of a step."),
    Metric(
        "exchange_seconds",
        "histogram",
        "Exchange between ranks in a step, waiting for slower ranks included.",
    ),
    Metric("objective_seconds", "histogram", "Loss and gradient of a step from this rank's rows."),
    Metric("optimizer_seconds", "histogram", "The optimizer's part of a step."),
    Metric("snapshot_seconds", "histogram", "Writing and committing a snapshot.", buckets=_SNAPSHOT_BUCKETS),
    Metric("images_total", "counter", "Images trained on."),
    Metric("exchange_bytes_total", "counter", "Bytes sent to other ranks, without DDP's gradients."),
    Metric("corrupt_images_total", "counter", "Different images that could not be decoded."),
    Metric(
        "restarts_total",
        "counter",
        "Of the run, from rank 0: times that the group was started again after a loss, since the command was.",
    ),
    Metric("snapshot_failures_total", "counter", "Snapshots that could not be written or committed."),
    Metric("loss", "gauge", "Of the run: mean loss of the last step; NaN if it was not finite."),
    Metric("learning_rate", "gauge", "Of the run: rate of the last step."),
    Metric("gradient_norm", "gauge", "Of the run: L2 norm of the last step's gradient."),
    Metric("embedding_norm", "gauge", "Mean L2 norm of the embeddings before they are made unit."),
    Metric("positive_similarity", "gauge", "Of the run: mean cosine of an embedding and its own row."),
    Metric("negative_similarity", "gauge", "Of the run: mean cosine of an embedding and other rows."),
    Metric("log_partition", "gauge", "Of the run: logarithm of the normalising constant Z."),
    Metric("knn_accuracy_ratio", "gauge", "Of the run: top-1 of weighted kNN, embeddings computed anew."),
    Metric("bank_knn_accuracy_ratio", "gauge", "Of the run: top-1 of weighted kNN by the bank as it stands."),
    Metric("bank_rows", "gauge", "Rows of the bank that this rank owns."),
    Metric("bank_bytes", "gauge", "Memory of those rows."),
    Metric("bank_element_bytes", "gauge", "Bytes of one number of the bank: 4 is float32, 2 half precision."),
    Metric("epoch", "gauge", "Of the run: epochs done, with fraction."),
    Metric("epochs", "gauge", "Of the run: epochs to do in all."),
    Metric("world_size", "gauge", "Of the run: ranks in the group."),
    Metric("snapshot_bytes", "gauge", "Of the run, from rank 0: size of the newest snapshot."),
    Metric(
        "snapshot_timestamp_seconds",
        "gauge",
        "Of the run, from rank 0: Unix time at which the newest snapshot was committed; before the first one, of the "
        "start.",
    ),
    Metric(
        "snapshot_age_seconds",
        "gauge",
        "Of the run, from rank 0: time since snapshot_timestamp_seconds.",
        since="snapshot_timestamp_seconds",
    ),
)
"""What the workers of a training run export."""

EVALUATION = (
    Metric("evaluation_queries_total", "counter", "Queries answered."),
    Metric("evaluation_search_seconds", "histogram", "Answering one block of queries by all shards of rows."),
    Metric("evaluation_actor_restarts_total", "counter", "Actors that were lost and started again."),
    Metric("evaluation_actors", "gauge", "Actors that hold rows."),
    Metric("evaluation_rows", "gauge", "Rows that are searched."),
    Metric("evaluation_knn_top1_ratio", "gauge", "Top-1 accuracy of weighted kNN."),
    Metric("evaluation_knn_top5_ratio", "gauge", "Top-5 accuracy of weighted kNN."),
)
"""What the evaluation job exports, from its driver, which is rank 0."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where workers serve their metrics."""

    port: int | None = 9500
    """Port of the first worker of a node; the next workers use the ports above it. 0 or None: no metrics are served."""

    def __post_init__(self) -> None:
        """Refuse what is no port."""
        if self.port is not None and not (self.port == 0 or 1024 <= self.port <= 65_000):
            raise ValueError(
                f"metrics port is {self.port}, it must be from 1024 to 65000, or 0 for no metrics"
            )


class Metrics:
    """The values of one process, in a registry of its own. Safe to use from several threads.

    Recording costs about a microsecond and is done whether or not the values are served.

    Args:
        table: `TRAINING` or `EVALUATION`.
        run: Name of the run, the same for its training and its evaluation, over all restarts.
        rank: This process among those of the run.
    """

    def __init__(self, table: tuple[Metric, ...], *, run: str, rank: int) -> None:
        # A directory's name may hold bytes that are no text.
        self.table, self.run, self.rank = table, os.fsencode(run).decode(errors="replace"), rank
        # Otherwise every counter and histogram exports its time of creation as a metric of its own.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._ages = {metric.since: metric.name for metric in table if metric.since}
        self._labels = (self.run, str(rank))
        for metric in table:
            name, text = PREFIX + metric.name, metric.help
            if metric.kind == "gauge":
                self._gauges[metric.name] = Gauge(name, text, LABELS, registry=self.registry)
            elif metric.kind == "counter":
                counter = Counter(name, text, LABELS, registry=self.registry)
                self._counters[metric.name] = counter.labels(*self._labels)
            else:
                histogram = Histogram(name, text, LABELS, registry=self.registry, buckets=metric.buckets)
                self._histograms[metric.name] = histogram.labels(*self._labels)

    def observe(self, name: str, value: float) -> None:
        """Add one value, a duration in seconds, to a histogram.

        Raises:
            KeyError: The table has no such histogram.
        """
        self._histograms[name].observe(value)

    def add(self, name: str, amount: float = 1) -> None:
        """Count.

        Raises:
            KeyError: The table has no such counter.
        """
        self._counters[name].inc(amount)

    def set(self, **values: float | None) -> None:
        """Set gauges by name; None stands for a value that there is not and changes nothing.

        Raises:
            KeyError: The table has no such gauge.
        """
        for name, value in values.items():
            gauge = self._gauges[name]
            if value is None:
                continue
            gauge.labels(*self._labels).set(value)
            if name in self._ages:
                age = self._gauges[self._ages[name]].labels(*self._labels)
                age.set_function(functools.partial(_seconds_since, value))


class Endpoint:
    """Where the metrics of a process are served; notes when they were asked for.

    Args:
        server: Serves them.
    """

    def __init__(self, server: WSGIServer) -> None:
        self._server, self._served = server, threading.Condition()
        self._asked: list[float] = []  # when each of the last answers was begun
        application: Any = server.get_app()

        def noting(environ: Any, start_response: Any) -> Any:
            begun = time.monotonic()
            answer = application(environ, start_response)
            with self._served:
                self._asked = [*self._asked[-1:], begun]
                self._served.notify_all()
            return answer

        server.set_app(noting)

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def wait_until_read(self) -> None:
        """Return when the values that stand now have been asked for; at once if nobody asks.

        For values that are set at the very end of a process. Waits for twice the time between the last two questions,
        at most a minute.
        """
        now = time.monotonic()
        with self._served:
            if len(self._asked) < 2:
                return
            longest = min(2 * (self._asked[1] - self._asked[0]), _LONGEST_WAIT_S)
            if now - self._asked[1] < longest:
                self._served.wait_for(lambda: self._asked[1] > now, longest)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def exported(
    metrics: Metrics, config: MetricsConfig, *, local_rank: int, world_size: int, directory: Path
) -> Iterator[Endpoint | None]:
    """Serve the metrics over HTTP and list the endpoint in `directory` as long as the context lasts.

    Listens on the address by which Ray knows this node, and on the loopback interface without Ray.

    Args:
        metrics: What to serve.
        config: Where.
        local_rank: This process among those of its node; keeps their ports apart.
        world_size: Ranks of the group. Files that a larger group left behind are removed.
        directory: Of the target files, shared by all nodes; `directory/*.json` belongs into `file_sd_configs`.

    Yields:
        Where they are served, or None if they are not.
    """
    server = _listen(metrics, config, local_rank)
    if server is None:
        yield None
        return
    endpoint = Endpoint(server)
    target = _Target(metrics, endpoint.address, directory)
    try:
        target.write(world_size)
        yield endpoint
    finally:
        endpoint.close()
        target.remove()


def remove_targets(directory: Path) -> None:
    """Remove the files of a training run's ranks, once none is left: a rank that was killed could not do so itself."""
    for file in directory.glob("rank-*.json"):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _seconds_since(timestamp: float) -> float:
    return time.time() - timestamp


def _listen(metrics: Metrics, config: MetricsConfig, local_rank: int) -> WSGIServer | None:
    """Start the server on the first free port; None, with a warning unless it is wished, if there is none.

    Waits for its own port, which a predecessor that is about to end may still hold: a cluster may scrape no other.
    """
    if not config.port:
        return None
    host, first = _node_address(), config.port + local_rank
    reason: Exception | None = None
    last = first + _PORTS_TRIED - 1
    for port in range(first, last + 1):
        try:
            return _serve(metrics, host, port, patience_s=_OWN_PORT_S if port == first else 0)
        except (OSError, OverflowError) as error:  # the latter beyond port 65535
            reason = error
    logger.warning(
        "rank %d serves no metrics: cannot listen on ports %d to %d of %s (%s); choose others with --metrics.port",
        *(metrics.rank, first, last, host, reason),
    )
    return None


def _serve(metrics: Metrics, host: str, port: int, patience_s: float) -> WSGIServer:
    """Start the server on a port; while that is in use, try again until the patience is over."""
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            server, _ = prometheus_client.start_http_server(port, host, metrics.registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= give_up_at:
                raise
        else:
            return server
        time.sleep(_TRY_EVERY_S)


def _node_address() -> str:
    """This node's address as the others know it."""
    ray = sys.modules.get("ray")  # imported by now if this process belongs to a cluster
    if ray is None or not ray.is_initialized():
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


class _Target:
    """The file by which Prometheus finds one endpoint."""

    def __init__(self, metrics: Metrics, address: str, directory: Path) -> None:
        self._kind = "evaluation" if metrics.table is EVALUATION else "rank"
        self._path = directory / f"{self._kind}-{metrics.rank}.json"
        labels = {"run": metrics.run, "rank": str(metrics.rank)}
        if metrics.table is EVALUATION:  # alerts on lost workers ask for the job of the configuration
            labels["job"] = "instdisc-evaluation"
        self._content = (json.dumps([{"targets": [address], "labels": labels}]) + "\n").encode()

    def write(self, world_size: int) -> None:
        """Write the file at once or not at all, and drop those of ranks that are no more."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_bytes(self._content)
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("Prometheus will not find this worker's metrics: %s", error)
        for other in self._path.parent.glob(f"{self._kind}-*.json"):
            number = re.fullmatch(rf"{self._kind}-(\d+)", other.stem)
            if number and int(number[1]) >= world_size:
                with suppress(OSError):
                    other.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file, unless a successor of this rank has written its own."""
        with suppress(OSError):
            if self._path.read_bytes() == self._content:
                self._path.unlink()
