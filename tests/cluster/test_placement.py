from collections.abc import Sequence

import pytest

from cluster.errors import ClusterError
from cluster.placement import Node, WorkerGroup, choose_group, describe, fitting_groups, require_room
from cluster.settings import LaunchConfig, Strategy

LAPTOP = [{"CPU": 8.0}]
MIXED = [{"CPU": 32.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 48.0, "GPU": 4.0}]


def chosen(
    nodes: Sequence[Node],
    num_workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: int | None = None,
    strategy: Strategy = "PACK",
) -> tuple[int, float, int]:
    group = choose_group(
        nodes,
        num_workers=num_workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        strategy=strategy,
    )
    return group.num_workers, group.cpus, group.gpus


def test_defaults_use_the_whole_cluster() -> None:
    assert chosen(LAPTOP) == (2, 4, 0)
    assert chosen([{"CPU": 1.0}]) == (1, 1, 0)
    assert chosen(MIXED) == (6, 8, 1)
    assert chosen([{"memory": 1e9}]) == (1, 1, 0)


def test_cpus_are_shared_such_that_all_workers_fit() -> None:
    assert chosen(LAPTOP, num_workers=3) == (3, 2, 0)
    # 12 CPUs for three workers would be 4 each, but then only two fit.
    assert chosen([{"CPU": 9.0}, {"CPU": 3.0}], num_workers=3) == (3, 3, 0)
    assert chosen([{"CPU": 9.0}, {"CPU": 3.0}], num_workers=2, strategy="STRICT_SPREAD") == (2, 3, 0)
    # Only the nodes with GPUs count where workers use them.
    assert chosen(MIXED, num_workers=4, strategy="SPREAD") == (4, 16, 1)


def test_what_is_given_is_kept() -> None:
    assert chosen(MIXED, num_workers=3, cpus_per_worker=0.5, gpus_per_worker=0) == (3, 0.5, 0)
    assert chosen(MIXED, gpus_per_worker=0) == (2, 32, 0)
    assert chosen(LAPTOP, gpus_per_worker=1) == (1, 1, 1)


def test_room_counts_workers_that_fit_on_one_node() -> None:
    assert WorkerGroup(9, 3, 0, "PACK").room([{"CPU": 8.0}, {"CPU": 8.0}]) == 4
    assert WorkerGroup(9, 3, 0, "STRICT_SPREAD").room([{"CPU": 8.0}, {"CPU": 8.0}]) == 2
    assert WorkerGroup(9, 8, 1, "PACK").room(MIXED) == 6
    assert WorkerGroup(9, 17, 1, "PACK").room(MIXED) == 2
    assert WorkerGroup(9, 1, 0, "PACK").room([]) == 0


@pytest.mark.parametrize(
    ("group", "remedy"),
    [
        (WorkerGroup(3, 4, 0, "PACK"), "room for 2: 1 node with 8 CPUs; ask for --num-workers 2 or fewer"),
        (WorkerGroup(2, 4, 1, "PACK"), "--gpus-per-worker 0"),
        (WorkerGroup(2, 9, 0, "PACK"), "lower --cpus-per-worker"),
        (WorkerGroup(2, 1, 0, "STRICT_SPREAD"), "--num-workers 1 or fewer"),
    ],
)
def test_refusal_names_the_flag_to_change(group: WorkerGroup, remedy: str) -> None:
    with pytest.raises(ClusterError, match=remedy):
        require_room(group, LAPTOP)


def test_many_nodes_and_parts_of_gpus_are_counted() -> None:
    def chosen(nodes: list[Node], num_workers: int | None) -> WorkerGroup:
        return choose_group(
            nodes, num_workers=num_workers, cpus_per_worker=None, gpus_per_worker=None, strategy="PACK"
        )

    assert chosen([{"CPU": 96.0}] * 3000, 1) == WorkerGroup(1, 96, 0, "PACK")
    assert chosen([{"CPU": 4.0, "GPU": 0.5}] * 2, None) == WorkerGroup(2, 4, 0, "PACK")
    assert chosen([{"CPU": 8.0, "GPU": 1.5}] * 2, None) == WorkerGroup(2, 8, 1, "PACK")


def test_enough_room_is_not_refused() -> None:
    require_room(WorkerGroup(2, 4, 0, "PACK"), LAPTOP)
    require_room(WorkerGroup(6, 8, 1, "PACK"), MIXED)


def test_nodes_are_described_by_kind() -> None:
    assert describe([*MIXED, {"CPU": 32.0, "memory": 1.0}]) == (
        "2 nodes with 32 CPUs, 1 node with 16 CPUs and 2 GPUs, 1 node with 48 CPUs and 4 GPUs"
    )


def test_fitting_groups_are_those_with_room_or_else_the_smallest() -> None:
    groups = [WorkerGroup(size, 4, 0, "PACK") for size in (4, 2, 1)]
    assert fitting_groups(groups, [{"CPU": 8.0}]) == groups[1:]
    assert fitting_groups(groups, [{"CPU": 2.0}, {"CPU": 3.0}]) == groups[2:]


@pytest.mark.ray
def test_elastic_workers_keep_their_size() -> None:
    from cluster.capacity import settle_workers

    def cpus(config: LaunchConfig, nodes: list[Node]) -> tuple[float | None, int | None]:
        settled = settle_workers(config, nodes)
        return settled.cpus_per_worker, settled.gpus_per_worker

    elastic = LaunchConfig(num_workers=32, min_workers=8)
    gpu_node = {"CPU": 64.0, "GPU": 8.0}
    assert cpus(elastic, [gpu_node]) == cpus(elastic, [gpu_node] * 4) == (8, 1)
    assert cpus(elastic, [gpu_node, {"CPU": 12.0, "GPU": 4.0}, {"CPU": 99.0}]) == (3, 1)
    assert cpus(LaunchConfig(num_workers=8, min_workers=2), [{"CPU": 16.0}] * 2) == (4, 0)
    assert cpus(LaunchConfig(num_workers=32, min_workers=8, gpus_per_worker=1), []) == (None, 1)
    assert cpus(LaunchConfig(num_workers=8, min_workers=2), [{"CPU": 3.0}]) == (None, 0)
    for nodes in ([], [{"CPU": 0.0}], [{"CPU": 16.0}] * 0):
        with pytest.raises(ClusterError, match="--cpus-per-worker, how many CPUs"):
            cpus(LaunchConfig(num_workers=8, min_workers=2, autoscaling=True), nodes)
    assert cpus(LaunchConfig(num_workers=2, min_workers=1, cpus_per_worker=5), [gpu_node]) == (5, 1)
    # Others share what there is at each start.
    assert cpus(LaunchConfig(num_workers=8), [gpu_node]) == (None, 1)


@pytest.mark.ray
def test_group_that_starts_again_is_the_largest_allowed_one() -> None:
    from cluster.capacity import groups_to_try

    def sizes(config: LaunchConfig, restarting: bool, gpus: float = 7.0) -> list[int]:
        nodes: list[Node] = [{"CPU": 16.0, "GPU": gpus}]
        groups = groups_to_try(nodes, config, lambda size: 256 % size == 0, restarting=restarting)
        return [group.num_workers for group in groups]

    assert sizes(LaunchConfig(), restarting=True) == [4]
    assert sizes(LaunchConfig(), restarting=True, gpus=8.0) == [8]
    # What was asked for is kept; a first start with a number that does not fit is for the user to mend.
    assert sizes(LaunchConfig(), restarting=False) == [7]
    assert sizes(LaunchConfig(num_workers=8), restarting=True) == [8]
    assert sizes(LaunchConfig(num_workers=8, min_workers=2), restarting=True) == [4, 2]
    assert sizes(LaunchConfig(num_workers=8, min_workers=2, autoscaling=True), restarting=False) == [4, 2]
    with pytest.raises(ClusterError, match="no number of workers from 3 to 3"):
        sizes(LaunchConfig(num_workers=3, min_workers=3), restarting=True)
