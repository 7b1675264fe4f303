"""The application as it is deployed: from the command line, or from a manifest."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from cluster.serving import Deployment, application, check_port, is_taken, run_until_interrupted
from instdisc.common.errors import ConfigError
from instdisc.serving.access import read_token
from instdisc.serving.service import open_source
from instdisc.settings.serve import ServeConfig


def serve(config: ServeConfig) -> None:
    """Serve an index until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: There is no index, no token where one is needed, or the port is taken.
        ClusterError: The cluster has no room, or serves already.
        KeyboardInterrupt: A signal before requests are answered.
    """
    digest = read_token(config)
    config = _absolute(config)
    _check(config)
    try:
        check_port(config.host, config.port)
    except OSError as error:
        if is_taken(error):
            raise ConfigError(
                f"port {config.port} of {config.host} is taken: end what listens there, or choose another --port"
            ) from error
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        ) from error

    def tell() -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"serving {config.index} at http://{host}:{config.port}/ (Ctrl-C ends it)", flush=True)

    run_until_interrupted(functools.partial(_make, config, digest), _deployment(config), tell)
    print("stopped")


def deployed(config: ServeConfig) -> Any:
    """The application for Ray Serve; nothing is opened before a replica starts.

    Raises:
        ConfigError: There is no token where one is needed.
    """
    digest = read_token(config)
    config = _absolute(config)
    return application(functools.partial(_make, config, digest), _deployment(config))


def _check(config: ServeConfig) -> None:
    """Find here what would otherwise be found by every replica, and told by its traceback."""
    source = open_source(config.index)
    _ = source.network
    if config.whitened:
        _ = source.whitening


def _absolute(config: ServeConfig) -> ServeConfig:
    """With paths that mean the same in other processes."""
    place = config.index if "://" in config.index else str(Path(config.index).expanduser().absolute())
    added = [
        str(Path(each).expanduser().absolute()) if Path(each).expanduser().exists() else each
        for each in config.add_from
    ]
    return dataclasses.replace(config, index=place, add_from=tuple(added))


def _deployment(config: ServeConfig) -> Deployment:
    return Deployment(
        host=config.host,
        port=config.port,
        replicas=config.replicas,
        cpus=1 if config.actors.num_actors == 0 else 0,
        most_requests=2 * config.limits.waiting,
    )


def _make(config: ServeConfig, digest: bytes | None, number: int) -> Any:
    from instdisc.serving.app import make_app

    return make_app(config, digest, number)
