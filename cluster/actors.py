"""How many actors of which size, the Ray they run on, and work that is shared out to them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.errors import ClusterError, WorkerLostError
from cluster.failures import out_of_memory
from cluster.placement import WorkerGroup, choose_group, describe
from cluster.settings import ActorsConfig

logger = logging.getLogger(__name__)

_WAIT_SLICE_S, _LONGEST_WAIT_S = 15, 1800


@contextlib.contextmanager
def connect(config: ActorsConfig) -> Iterator[None]:
    """Be connected to Ray for the block, as `cluster.launch.launch` is, unless `num_actors` is 0.

    Raises:
        ClusterError: The cluster cannot be reached.
    """
    if config.num_actors == 0:
        yield
        return
    from cluster.session import ray_session

    with ray_session():
        yield


def choose_actors(config: ActorsConfig) -> WorkerGroup:
    """Fill in what the configuration leaves open from what the cluster has, and wait for room. Needs a connection.

    Raises:
        ClusterError: The cluster has no room for the actors even when idle, or none within half an hour.
    """
    import ray

    from cluster.capacity import is_granted

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    group = choose_group(
        nodes,
        num_workers=config.num_actors,
        cpus_per_worker=config.cpus_per_actor,
        gpus_per_worker=config.gpus_per_actor,
        strategy="SPREAD",
    )
    if group.room(nodes) < group.num_workers:
        raise ClusterError(
            f"asked for {group.num_workers} actors of {group.resources_per_worker}, but the cluster has room for "
            f"{group.room(nodes)}: {describe(nodes)}; lower --num-actors, --cpus-per-actor or --gpus-per-actor"
        )
    for waited in range(0, _LONGEST_WAIT_S, _WAIT_SLICE_S):
        if is_granted(group, group.num_workers, _WAIT_SLICE_S):
            return group
        logger.warning(
            "waiting for %d actors of %s: other jobs hold the cluster (%d of %d s)",
            *(group.num_workers, group.resources_per_worker, waited + _WAIT_SLICE_S, _LONGEST_WAIT_S),
        )
    raise ClusterError(
        f"waited {_LONGEST_WAIT_S} s for {group.num_workers} actors of {group.resources_per_worker}: "
        "ask for less with --num-actors or --cpus-per-actor, or wait until other jobs end"
    )


def share_out(
    function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], config: ActorsConfig
) -> Iterator[Any]:
    """Call a function for every item, in as many processes at a time as there would be actors.

    Args:
        function: Importable by name.
        shared: Its first argument, sent to each node once.
        items: Its second argument.
        config: What a process gets; with `num_actors=0` the calls are made here.

    Yields:
        The results, in the order of the items.

    Raises:
        ClusterError: The cluster has no room.
        WorkerLostError: A process died repeatedly.
        Exception: What the function raised.
    """
    if config.num_actors == 0:
        for item in items:
            yield function(shared, item)
        return
    import ray

    with connect(config):
        group = choose_actors(config)
        stored = ray.put(shared)
        remote = ray.remote(num_cpus=group.cpus, num_gpus=group.gpus, max_retries=2)(function)
        for reference in [remote.remote(stored, item) for item in items]:
            yield get([reference])[0]


def get(references: Sequence[Any]) -> list[Any]:
    """What calls in other processes returned; errors as they were raised there.

    Raises:
        WorkerLostError: A process died repeatedly.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        values: list[Any] = ray.get(list(references))
        return values
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
    except RayError as error:
        cause = out_of_memory(str(error)) or error
        raise WorkerLostError(f"an actor died and could not be restarted: {cause}") from error


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
