"""A connection to a Ray cluster, or a cluster of its own, for a block."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import ClusterError
from cluster.stopping import hangups_ignored, signals_as_interrupt

# Ray reads these from the environment only, most of them when it is imported. What the user has set wins.
_RAY_ENVIRONMENT = {
    # Otherwise workers move to a directory of Ray Train, and relative paths with them.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Workers name their rank themselves.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # How often to look for failed and finished workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Rank 0 looks for drained nodes itself, and `launch` starts again.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The resources have just been granted: where they are not, a node was lost since.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # A cluster of our own sends no statistics of its use to Ray's makers.
    "RAY_USAGE_STATS_ENABLED": "0",
}
_CONNECT_S = 10.0


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to a Ray cluster, starting one if there is none, and leave it as found."""
    for variable, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # Silence Ray's notice about token authentication: it is noise for a cluster that we started.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, where jobs are submitted: run `ray job submit --address {address} "
            "--working-dir . -- COMMAND`, or, on a machine of the cluster, set RAY_ADDRESS to the HOST:6379 of its head"
        )
    try:
        if address not in ("", "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            # Ray itself would retry forever.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        with hangups_ignored():  # a cluster of our own ends with this process, which saves first
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        if "AF_UNIX path length" in str(error):
            directory = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            raise ClusterError(
                f"cannot start Ray: {directory}, the directory for temporary files, has too long a name "
                "for the sockets that Ray keeps in it; set RAY_TMPDIR to one with a short name, such as /tmp"
            ) from error
        raise ClusterError(
            f"cannot reach Ray (RAY_ADDRESS is {address!r}): {error}; check that the cluster runs (`ray status`), and, "
            "if it has a token, that RAY_AUTH_MODE=token is exported here and ~/.ray/auth_token is the cluster's; or "
            "run without Ray: --num-workers 0 (evaluation: --num-actors 0)"
        ) from error
    try:
        with signals_as_interrupt():
            yield
    finally:
        ray.shutdown()
