"""Where on a Ray cluster a worker group finds room: now, after a wait, or for more workers than are running."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.errors import ClusterError
from cluster.placement import Node, WorkerGroup, amounts, choose_group, describe, fitting_groups, require_room
from cluster.settings import LaunchConfig
from cluster.stopping import draining_nodes

logger = logging.getLogger(__name__)

_WAIT_SLICE_S = 15.0
# Elastic groups try the next smaller size instead of waiting longer.
_ELASTIC_SLICE_S = 5.0
_GROW_EVERY_S = 15.0


def wait_for_room(
    config: LaunchConfig, is_allowed: Callable[[int], bool], *, restarting: bool
) -> WorkerGroup:
    """Return the group to start once the cluster has granted its resources, at most `config.wait_s` later.

    A request beyond the whole cluster is refused at once, unless more nodes may come: the cluster adds them, or a
    lost node is being replaced.
    """
    start = time.monotonic()
    slice_s = _WAIT_SLICE_S if config.min_workers is None else _ELASTIC_SLICE_S
    groups: Sequence[WorkerGroup] = []
    while True:
        # Queried each time: nodes come and go while waiting.
        nodes = live_nodes()
        before, groups = groups, groups_to_try(nodes, config, is_allowed, restarting=restarting)
        if groups != before:
            in_turn = itertools.cycle(groups)
        if not restarting and not config.autoscaling:
            _require_room(groups[-1], nodes, config)
        group = next(in_turn)
        if is_granted(group, group.num_workers, min(slice_s, config.wait_s)):
            return group
        waited = time.monotonic() - start
        free = amounts(ray.available_resources())  # type: ignore[no-untyped-call]
        if waited >= config.wait_s:
            raise ClusterError(
                f"waited {waited:.0f} s for {group}; the cluster has {describe(nodes)}, free are {free}; ask "
                "for less with --num-workers or --cpus-per-worker, wait longer with --wait-s or stop other jobs"
            )
        logger.warning("waiting for %s: free are %s (%.0f of %.0f s)", group, free, waited, config.wait_s)


def check_capacity(config: LaunchConfig) -> None:
    """Refuse a group that the cluster could not hold even if it were idle, unless the cluster adds nodes.

    Raises:
        ClusterError: Names what was requested and what is available.
    """
    if config.autoscaling:
        return
    nodes = live_nodes()
    smallest = groups_to_try(nodes, config, lambda num_workers: True, restarting=False)[-1]
    _require_room(smallest, nodes, config)


def _require_room(smallest: WorkerGroup, nodes: Sequence[Node], config: LaunchConfig) -> None:
    require_room(smallest, nodes, "--num-workers" if config.min_workers is None else "--min-workers")


def _choose(nodes: Sequence[Node], config: LaunchConfig, num_workers: int | None) -> WorkerGroup:
    return choose_group(
        nodes,
        num_workers=num_workers,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        strategy=config.strategy,
    )


def settle_workers(config: LaunchConfig, nodes: Sequence[Node]) -> LaunchConfig:
    """Return the settings with what a run keeps when it starts again, chosen by the nodes of its first start.

    These are the kind of device, and of an elastic group the CPUs of a worker: the share of its GPU, or of the largest
    group. A smaller group whose workers took what the others had left would have no room to grow again.

    Raises:
        ClusterError: The share depends on nodes that have not been added yet.
    """
    group = _choose(nodes, config, config.num_workers)
    cpus = config.cpus_per_worker
    if cpus is None and config.min_workers is not None:
        shares = [node.get("CPU", 0.0) // node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
        if group.gpus and shares:
            cpus = max(1.0, min(shares))
        elif group.room(nodes) >= group.num_workers:
            cpus = group.cpus
        elif config.autoscaling:
            raise ClusterError(
                f"the cluster has {describe(nodes) or 'no nodes'} and will grow: set "
                "--cpus-per-worker, how many CPUs each of the elastic workers gets"
            )
    return dataclasses.replace(config, cpus_per_worker=cpus, gpus_per_worker=group.gpus)


@contextmanager
def watching_for_room(
    group: WorkerGroup, config: LaunchConfig, is_allowed: Callable[[int], bool], found: Callable[[str], None]
) -> Iterator[None]:
    """For the block, look for room for more workers than an elastic group has, and call `found(reason)` once.

    The request to an autoscaler is repeated, as jobs overwrite each other's requests.
    """
    ended = threading.Event()
    wanted = config.num_workers or 0
    # A request cannot say where to place the workers.
    asks = config.autoscaling and config.strategy != "STRICT_SPREAD"

    def ask(workers: int) -> None:
        if asks:
            request_resources(bundles=[group.resources_per_worker] * workers)

    def watch() -> None:
        while not ended.wait(_GROW_EVERY_S):
            try:
                ask(wanted)
                larger = groups_to_try(live_nodes(), config, is_allowed, restarting=True)[0]
                more = larger.num_workers - group.num_workers
                if more > 0 and can_grow(larger, more):
                    found(f"there is room for {larger.num_workers} workers instead of {group.num_workers}")
                    return
            except (RayError, ClusterError) as error:
                logger.debug("cannot look for more room: %s", error)

    if config.min_workers is None or group.num_workers == config.num_workers:
        yield
        return
    ask(wanted)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * _ELASTIC_SLICE_S)
        with suppress(RayError):
            ask(0)


def live_nodes() -> list[Node]:
    """Return the resources of the live nodes that are not being drained."""
    draining = draining_nodes()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in draining]


def groups_to_try(
    nodes: list[Node], config: LaunchConfig, is_allowed: Callable[[int], bool], *, restarting: bool
) -> Sequence[WorkerGroup]:
    """Return the groups to try, the largest first.

    A group that starts again where the number of workers was left open is the largest allowed one.

    Raises:
        ClusterError: No number of workers is allowed.
    """
    largest = _choose(nodes, config, config.num_workers)
    is_elastic = config.min_workers is not None
    if not is_elastic and (config.num_workers is not None or not restarting):
        return [largest]
    fewest = config.min_workers or 1
    most = max(largest.num_workers, fewest)
    sizes = [size for size in range(most, fewest - 1, -1) if is_allowed(size)]
    if not sizes:
        raise ClusterError(
            f"no number of workers from {fewest} to {most} divides the work evenly: change --min-workers, "
            "--num-workers or the size of the batch"
        )
    fitting = fitting_groups([_choose(nodes, config, size) for size in sizes], nodes)
    return fitting if is_elastic else fitting[:1]


def can_grow(larger: WorkerGroup, more: int) -> bool:
    """Return whether `more` workers find room beside this job's group, which is to become as large as `larger`."""
    selector: dict[str, str] = {}
    if larger.strategy == "STRICT_SPREAD" and (taken := _nodes_of_this_job()):
        # The request by itself knows nothing of the workers that run, whose nodes may have CPUs left.
        selector = {"ray.io/node-id": f"!in({','.join(sorted(taken))})"}
    return is_granted(larger, more, _ELASTIC_SLICE_S, selector)


def _nodes_of_this_job() -> set[str]:
    """Return the ids of the nodes on which this job holds reservations."""
    job = ray.get_runtime_context().get_job_id()  # with which the ids of its placement groups end
    return {
        node
        for identity, entry in placement_group_table().items()
        if identity.endswith(job) and entry["state"] != "REMOVED"
        for node in entry["bundles_to_node_id"].values()
        if node  # not placed yet
    }


def is_granted(
    group: WorkerGroup, workers: int, timeout_s: float, selector: dict[str, str] | None = None
) -> bool:
    """Return whether this many of the group's workers find free resources in time, on nodes that `selector` matches."""
    reservation = placement_group(
        [group.resources_per_worker] * workers,
        group.strategy,
        bundle_label_selector=[selector] * workers if selector else None,
    )
    try:
        return bool(reservation.wait(timeout_s))
    finally:
        remove_placement_group(reservation)
