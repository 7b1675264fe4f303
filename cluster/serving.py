"""An ASGI application on Ray Serve, from one process on a laptop to replicas on a cluster."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError
from cluster.session import ray_session

APPLICATION = "instdisc"
_NO_ACCESS_LOG = {"log_level": "WARNING", "enable_access_log": False}
_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How an application is deployed.

    Attributes:
        host: The address to listen on.
        port: Its port.
        replicas: Processes that answer, each with the whole application.
        cpus: Reserved for each of them.
        most_requests: That a replica works on at a time; as many wait in front of it, and all others get 503.
    """

    host: str
    port: int
    replicas: int
    cpus: float
    most_requests: int


def check_port(host: str, port: int) -> None:
    """Find out whether a port is free, as Serve says it at length and only after it has started.

    Raises:
        OSError: It is not, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def is_taken(error: OSError) -> bool:
    """Whether `check_port` says that another process listens there."""
    return error.errno == errno.EADDRINUSE


def application(make: Callable[[int], Any], deployment: Deployment) -> Any:
    """The application as Serve deploys it.

    Args:
        make: Called in every replica with its number, returns the ASGI application; picklable. What has to be loaded
            belongs into the application's lifespan.
        deployment: How.
    """
    from ray import serve

    def build() -> Any:
        return make(_number_of_this_replica())

    deployed = serve.deployment(
        name="replica",
        num_replicas=deployment.replicas,
        max_ongoing_requests=deployment.most_requests,
        max_queued_requests=deployment.most_requests,
        graceful_shutdown_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=3.0,
        ray_actor_options={"num_cpus": deployment.cpus},
        logging_config=_NO_ACCESS_LOG,
    )(serve.ingress(build)())
    return deployed.bind()


def _number_of_this_replica() -> int:
    from ray import serve

    return int(serve.get_replica_context().rank.rank)


def run_until_interrupted(
    make: Callable[[int], Any], deployment: Deployment, on_ready: Callable[[], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM, then let the requests under way end, and return.

    Args:
        make: See `application`.
        deployment: How.
        on_ready: Called once requests are answered.

    Raises:
        ClusterError: Serve runs on this cluster already, or the replicas do not start.
        KeyboardInterrupt: A signal before that.
    """
    with ray_session():
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _check_unused(serve)
        try:
            serve.start(
                proxy_location="EveryNode",
                http_options={"host": deployment.host, "port": deployment.port},
                logging_config=_NO_ACCESS_LOG,
            )
            logging.getLogger("ray.serve").setLevel(logging.WARNING)  # which `start` has set
            serve.run(application(make, deployment), name=APPLICATION, logging_config=_NO_ACCESS_LOG)
            on_ready()
            _wait()
        except RuntimeError as error:
            raise ClusterError(f"the replicas do not start: {_last_line(error)}") from error
        finally:
            _end(serve)


def _end(serve: Any) -> None:
    from ray._private import worker  # which alone knows whether the cluster is our own

    if worker.global_worker.node is not None and worker.global_worker.node.is_head():
        serve.delete(APPLICATION)  # lets requests end; all else goes with the cluster
    else:
        serve.shutdown()


def _check_unused(serve: Any) -> None:
    running = serve.status().applications
    if running:
        raise ClusterError(
            f"Ray Serve runs on this cluster already, with {', '.join(running)}: deploy beside it as deploy/README.md "
            "says, or end it with `serve shutdown`"
        )


def _wait() -> None:
    try:
        while True:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
