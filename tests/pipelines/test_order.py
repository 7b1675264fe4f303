import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.order import Order


def whole_epoch(num_instances: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return Order(num_instances=num_instances, global_batch=num_instances, seed=seed).rows(epoch, 0)


def rank_rows(order: Order, epoch: int) -> np.ndarray:
    return np.stack([order.rows(epoch, step) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize("num_instances", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 4096, 4097, 5000, 65536, 65537])
def test_an_epoch_is_a_permutation(num_instances: int) -> None:
    for seed, epoch in itertools.product((0, 7), (0, 1)):
        rows = whole_epoch(num_instances, seed, epoch)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(np.sort(rows), np.arange(num_instances))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_for_any_seed(num_instances: int, seed: int, epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(whole_epoch(num_instances, seed, epoch)), np.arange(num_instances))


def test_random_access_needs_no_memory() -> None:
    order = Order(num_instances=10**15, global_batch=8, seed=0)
    rows = np.concatenate([order.rows(3, step) for step in (0, 1, 10**12, order.steps_per_epoch - 1)])
    assert len(set(rows.tolist())) == 32
    assert rows.min() >= 0
    assert rows.max() < 10**15


def test_epochs_and_seeds_differ() -> None:
    orders = [whole_epoch(1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    for one, other in itertools.combinations(orders, 2):
        assert np.count_nonzero(one == other) < 15  # one expected


@pytest.mark.slow
@pytest.mark.parametrize("num_instances", [3, 4, 6, 10, 100])
def test_positions_and_neighbors_are_uniform(num_instances: int) -> None:
    trials = 4000
    orders = np.stack([whole_epoch(num_instances, seed) for seed in range(trials)])
    for position in (0, num_instances // 2, num_instances - 1):
        assert_uniform(np.bincount(orders[:, position], minlength=num_instances))
    steps = (orders[:, 1] - orders[:, 0]) % num_instances
    assert_uniform(np.bincount(steps, minlength=num_instances)[1:])


def test_one_order_is_spread_evenly() -> None:
    num_instances, cells = 60_000, 20
    rows = whole_epoch(num_instances)
    cell = rows * cells // num_instances
    pairs = np.bincount(cell[:-1] * cells + cell[1:], minlength=cells * cells)
    positions = np.bincount(cell * cells + np.arange(num_instances) * cells // num_instances)
    assert_uniform(pairs)
    # Each row and column of this table has a fixed sum, hence fewer degrees of freedom.
    assert_uniform(positions, degrees=(cells - 1) ** 2)


def assert_uniform(counts: np.ndarray, degrees: int | None = None) -> None:
    expected = counts.mean()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = degrees or len(counts) - 1
    # Chi-square has mean d and variance 2d; the right tail of small d is heavier than the normal one.
    assert degrees - 4 * np.sqrt(2 * degrees) < statistic < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_id_twice_and_global_batch_independent_of_world_size(world_size: int) -> None:
    num_instances, global_batch, epoch = 1000, 24, 2
    ranks = [
        rank_rows(
            Order(
                num_instances=num_instances,
                global_batch=global_batch,
                seed=5,
                world_size=world_size,
                rank=rank,
            ),
            epoch,
        )
        for rank in range(world_size)
    ]
    together = np.concatenate(ranks, axis=1)
    assert len(np.unique(together)) == together.size == num_instances // global_batch * global_batch
    alone = rank_rows(Order(num_instances=num_instances, global_batch=global_batch, seed=5), epoch)
    np.testing.assert_array_equal(together, alone)


def test_the_tail_left_out_changes() -> None:
    order = Order(num_instances=1000, global_batch=300, seed=0)
    left_out = [frozenset(range(1000)) - set(rank_rows(order, epoch).ravel().tolist()) for epoch in range(4)]
    assert {len(rows) for rows in left_out} == {100}
    assert len(set(left_out)) == 4


def test_resuming_anywhere_continues_the_stream() -> None:
    order = Order(num_instances=50, global_batch=12, seed=1, world_size=2, rank=1)
    stream = list(order.requests(num_epochs=3))
    assert len(stream) == 3 * 4
    assert [request.epoch for request in stream] == [0] * 4 + [1] * 4 + [2] * 4
    places = [(epoch, step) for epoch in range(3) for step in range(5)]  # step 4: at the end of an epoch
    for epoch, step in places:
        resumed = list(order.requests(epoch, step, num_epochs=3))
        expected = stream[4 * epoch + step :]
        assert [request.epoch for request in resumed] == [request.epoch for request in expected]
        for got, wanted in zip(resumed, expected, strict=True):
            np.testing.assert_array_equal(got.rows, wanted.rows)


def test_requests_are_endless_without_a_last_epoch() -> None:
    order = Order(num_instances=10, global_batch=5, seed=1)
    assert [request.epoch for request in itertools.islice(order.requests(), 100)] == [
        i // 2 for i in range(100)
    ]


def test_errors_say_what_to_set() -> None:
    with pytest.raises(
        DataError, match=r"256 cannot be shared equally by 3 workers: .* multiple of 3, such as 258"
    ):
        Order(num_instances=1000, global_batch=256, seed=0, world_size=3)
    with pytest.raises(DataError, match=r"100 images are fewer .* 256: set the global batch to at most 100"):
        Order(num_instances=100, global_batch=256, seed=0)
    with pytest.raises(ValueError, match="rank is 2"):
        Order(num_instances=100, global_batch=4, seed=0, world_size=2, rank=2)
    with pytest.raises(ValueError, match="no step 25"):
        Order(num_instances=100, global_batch=4, seed=0).rows(0, 25)
    with pytest.raises(ValueError, match="no step 26"):
        next(Order(num_instances=100, global_batch=4, seed=0).requests(0, 26))
