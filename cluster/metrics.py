"""Metrics of a process for Prometheus, and the endpoint that serves them.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.settings import MetricsConfig
from cluster.storage import Storage

logger = logging.getLogger(__name__)

LABELS = ("run", "rank")

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
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


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """All metrics of one kind of process.

    Attributes:
        metrics: The metrics.
        prefix: Put before each metric's name.
        targets: Beginning of the names of the files by which Prometheus finds such processes: `TARGETS-RANK.json`.
        labels: Further labels of their targets.
    """

    metrics: tuple[Metric, ...]
    prefix: str
    targets: str = "rank"
    labels: Mapping[str, str] = field(default_factory=dict)


class Metrics:
    """The values of one process, in a registry of its own. Safe to use from several threads.

    Recording costs about a microsecond and is done whether or not the values are served.

    Args:
        table: The metrics that it has.
        run: Name of the run, the same for its training and its evaluation, over all restarts.
        rank: This process among those of the run.
    """

    def __init__(self, table: MetricTable, *, run: str, rank: int) -> None:
        # A directory's name may hold bytes that are not valid UTF-8.
        self.table, self.run, self.rank = table, os.fsencode(run).decode(errors="replace"), rank
        # Otherwise every counter and histogram exports its time of creation as a metric of its own.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._ages = {metric.since: metric.name for metric in table.metrics if metric.since}
        self._labels = (self.run, str(rank))
        for metric in table.metrics:
            name, text = table.prefix + metric.name, metric.help
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
        """Set gauges by name; None means "no value" and leaves the gauge unchanged.

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

    def wait_until_read(self, at_most_s: float = _LONGEST_WAIT_S) -> None:
        """Wait until the current values have been scraped; return immediately if nothing scrapes them.

        For values that are set at the very end of a process. Waits for twice the time between the last two questions,
        at most `at_most_s`.
        """
        now = time.monotonic()
        with self._served:
            if len(self._asked) < 2:
                return
            longest = min(2 * (self._asked[1] - self._asked[0]), at_most_s)
            if now - self._asked[1] < longest:
                self._served.wait_for(lambda: self._asked[1] > now, longest)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def exported(
    metrics: Metrics, config: MetricsConfig, *, local_rank: int, world_size: int, directory: Path | None
) -> Iterator[Endpoint | None]:
    """Serve the metrics over HTTP and list the endpoint in `directory` as long as the context lasts.

    Listens on the address by which Ray knows this node, and on the loopback interface without Ray.

    Args:
        metrics: What to serve.
        config: Where.
        local_rank: This process among those of its node; keeps their ports apart.
        world_size: Ranks of the group. Files that a larger group left behind are removed.
        directory: Of the target files, shared by all nodes; `directory/*.json` belongs into `file_sd_configs`. None:
            none is written.

    Yields:
        Where they are served, or None if they are not.
    """
    server = _listen(metrics, config, local_rank)
    if server is None:
        yield None
        return
    endpoint = Endpoint(server)
    target = None if directory is None else _Target(metrics, endpoint.address, directory)
    try:
        if target is not None:
            target.write(world_size)
        yield endpoint
    finally:
        endpoint.close()
        if target is not None:
            target.remove()


def remove_targets(directory: Path) -> None:
    """Remove the files of a training run's ranks, once none is left: a rank that was killed could not do so itself."""
    for file in directory.glob("rank-*.json"):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _seconds_since(timestamp: float) -> float:
    return time.time() - timestamp


def _listen(metrics: Metrics, config: MetricsConfig, local_rank: int) -> WSGIServer | None:
    """Start the server on the first free port. Returns None if none is free (with a warning) or metrics are off.

    Waits for its own port, which a predecessor that is about to exit may still hold: a cluster may scrape no other.
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
    node = ray.get_runtime_context().get_node_id()
    return next(str(known["NodeManagerAddress"]) for known in ray.nodes() if known["NodeID"] == node)


class _Target:
    """The file by which Prometheus finds one endpoint."""

    def __init__(self, metrics: Metrics, address: str, directory: Path) -> None:
        self._kind = metrics.table.targets
        self._path = directory / f"{self._kind}-{metrics.rank}.json"
        labels = {"run": metrics.run, "rank": str(metrics.rank), **metrics.table.labels}
        self._content = (json.dumps([{"targets": [address], "labels": labels}]) + "\n").encode()

    def write(self, world_size: int) -> None:
        """Write the file atomically, and remove those of ranks that no longer exist."""
        try:
            Storage.at(self._path.parent).write(self._path.name, self._content)
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
