"""Rows reach the right rank, in the right order, of any dtype, and every byte is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.exchange import Exchange
from cluster.partition import Partition
from tests.processes import run_ranks

WORLD_SIZES = [1, 2, 3]
DIM = 5


def rows_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(4 * DIM).view(4, DIM) + 100 * rank).to(dtype)


def gather_and_return(rank: int, world_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    exchange = Exchange(rank, world_size)
    ids = torch.tensor([rank, rank + 10, -1, rank + 30])
    rows, all_ids = exchange.gather(rows_of(rank, dtype), ids)
    sent_to_gather = exchange.sent_bytes
    answers = exchange.to_askers(rows.double() * (rank + 1))
    return rows, all_ids, answers, torch.tensor([sent_to_gather, exchange.sent_bytes - sent_to_gather])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_reach_every_owner_and_answers_their_asker(world_size: int, dtype: torch.dtype) -> None:
    results = run_ranks(world_size, gather_and_return, dtype)
    everything = torch.cat([rows_of(rank, dtype) for rank in range(world_size)])
    for rank, (rows, ids, answers, sent) in enumerate(results):
        assert rows.dtype == dtype
        assert torch.equal(rows, everything)
        assert ids.tolist() == [id_ for r in range(world_size) for id_ in (r, r + 10, -1, r + 30)]
        expected = torch.stack([rows_of(rank, dtype).double() * (owner + 1) for owner in range(world_size)])
        assert torch.equal(answers, expected)
        assert sent.tolist() == [
            (world_size - 1) * 4 * (DIM * dtype.itemsize + 8),
            (world_size - 1) * 4 * DIM * 8,
        ]


def route(
    rank: int, world_size: int, num_rows: int, ids: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    exchange = Exchange(rank, world_size)
    mine = torch.tensor(ids[rank])
    rows = mine[:, None].expand(-1, DIM).to(torch.bfloat16)
    owned, received = exchange.route(rows, torch.tensor(ids).flatten(), Partition(num_rows, world_size))
    return owned, received, exchange.sent_bytes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[0, 4, 8, 2], [3, 1, 6, 7], [10, 5, 9, 11]], id="mixed"),
        pytest.param([[0, 1, 2, 3], [4, 5, -1, -1], [-1, -1, -1, -1]], id="uneven, some missing"),
        pytest.param([[11, 10, -1, 9], [8, -1, 7, 6], [0, 1, 2, 3]], id="nothing stays"),
        pytest.param([[-1] * 4] * 3, id="nothing at all"),
    ],
)
def test_rows_reach_the_owner_of_their_id(world_size: int, ids: list[list[int]]) -> None:
    partition = Partition(12, world_size)
    results = run_ranks(world_size, route, 12, ids[:world_size])
    sent = 0
    for rank, (owned, received, _) in enumerate(results):
        expected = [
            id_
            for part in ids[:world_size]
            for id_ in part
            if partition.start(rank) <= id_ < partition.stop(rank)
        ]
        assert owned.tolist() == expected
        assert torch.equal(received, torch.tensor(expected).view(-1, 1).expand(-1, DIM).to(torch.bfloat16))
        moved = [id_ for id_ in expected if id_ not in ids[rank]]
        sent += len(moved) * DIM * 2
    assert sum(result[2] for result in results) == sent


@pytest.fixture
def one_of_64() -> Iterator[Exchange]:
    """Rank 3 of 64 on PyTorch's backend for tests, which sends nothing but checks shapes and splits."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    yield Exchange(3, 64)
    dist.destroy_process_group()


@pytest.mark.parametrize("receives", [True, False])
@pytest.mark.parametrize("sends", [True, False])
def test_ranks_that_send_or_receive_nothing(one_of_64: Exchange, sends: bool, receives: bool) -> None:
    partition = Partition(64 * 1024, 64)
    ids = torch.arange(256) + (partition.start(3) - 4 if receives else partition.stop(3))
    if not sends:
        ids[12:16] = -1  # those of rank 3, none of whose images could be decoded
    owned, rows = one_of_64.route(torch.ones(4, DIM), ids, partition)
    assert len(owned) == len(rows) == receives * (252 - 4 * (not sends))
    announced = one_of_64.announce(ids[12:16], flag=False)
    assert announced.ids.shape == (64, 4)


def announce(rank: int, world_size: int, raised: int | None) -> tuple[list[list[int]], bool, int]:
    exchange = Exchange(rank, world_size)
    announced = exchange.announce(torch.tensor([10 * rank, -1]), flag=rank == raised)
    return announced.ids.tolist(), announced.flag, exchange.sent_bytes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("raised", [None, 0])
def test_ids_and_a_flag_reach_every_host(world_size: int, raised: int | None) -> None:
    for ids, flag, sent in run_ranks(world_size, announce, raised):
        assert ids == [[10 * rank, -1] for rank in range(world_size)]
        assert flag == (raised is not None)
        assert sent == (world_size - 1) * 3 * 8


def reduce(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exchange = Exchange(rank, world_size)
    mine = torch.tensor([rank + 1.0, -rank])
    return exchange.sum(mine), exchange.maximum(mine), mine


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sums_and_maxima(world_size: int) -> None:
    for rank, (total, largest, mine) in enumerate(run_ranks(world_size, reduce)):
        assert total.tolist() == [sum(range(1, world_size + 1)), -sum(range(world_size))]
        assert largest.tolist() == [world_size, 0]
        assert mine.tolist() == [rank + 1, -rank]
