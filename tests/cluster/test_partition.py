"""Every row has one owner, shards are whole blocks, and blocks do not depend on the number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.partition import Partition


@given(num_rows=st.integers(1, 3_000_000_000), world_size=st.integers(1, 40))
def test_shards_are_whole_blocks_and_cover_everything(num_rows: int, world_size: int) -> None:
    if Partition(num_rows, 1).num_blocks < world_size:
        with pytest.raises(ValueError, match="use at most"):
            Partition(num_rows, world_size)
        return
    partition = Partition(num_rows, world_size)
    assert partition.block == Partition(num_rows, 1).block
    assert partition.start(0) == 0
    assert partition.stop(world_size - 1) == num_rows
    sizes = []
    for rank in range(world_size):
        start, stop = partition.start(rank), partition.stop(rank)
        assert start < stop
        assert start % partition.block == 0
        sizes.append(-(-(stop - start) // partition.block))
        edges = torch.tensor([start, stop - 1, -1])
        assert partition.owners(edges).tolist() == [rank, rank, -1]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_rows", [5_000, 50_000, 1_281_167, 1_000_000_000])
def test_tables_of_usual_sizes_can_be_cut_over_many_ranks(num_rows: int) -> None:
    partition = Partition(num_rows, 16)
    shares = [partition.stop(rank) - partition.start(rank) for rank in range(16)]
    assert max(shares) <= 1.1 * num_rows / 16 + 256
