"""Which rank owns which rows: contiguous ranges of whole blocks, as even as those allow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MOST_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Partition:
    """Rows 0 … num_rows - 1 cut into `world_size` contiguous shards of whole blocks.

    The block depends on the number of rows alone, so that what is stored by blocks can be read and written by any
    number of ranks, each of which owns whole blocks. Every rank computes the same cut; nothing is communicated.

    Raises:
        ValueError: There are fewer blocks than ranks.
    """

    num_rows: int
    world_size: int

    def __post_init__(self) -> None:
        if self.num_blocks < self.world_size:
            raise ValueError(
                f"{self.num_rows} rows are {self.num_blocks} blocks of {self.block} and cannot be cut over "
                f"{self.world_size} ranks: use at most {self.num_blocks} workers"
            )

    @property
    def block(self) -> int:
        """Rows of a block, a power of two: between 16 and 1024 blocks for all but the smallest and largest tables."""
        rows = max(self.num_rows // 1024, min(self.num_rows // 16, 256), 1)
        return int(min(_MOST_BLOCK_ROWS, 1 << (rows.bit_length() - 1)))

    @property
    def num_blocks(self) -> int:
        """Blocks of the table, the last one perhaps not full."""
        return -(-self.num_rows // self.block)

    def start(self, rank: int) -> int:
        """First row of `rank`."""
        return min(self.num_rows, self.num_blocks * rank // self.world_size * self.block)

    def stop(self, rank: int) -> int:
        """One past the last row of `rank`."""
        return self.start(rank + 1)

    def owners(self, rows: Tensor) -> Tensor:
        """The rank that owns each row.

        Args:
            rows: int64, any shape, on the CPU; negative numbers mean "no row".

        Returns:
            int64, same shape; -1 where the row is negative.
        """
        import torch  # here, so that sizes are quick to compute

        return torch.where(rows < 0, -1, torch.bucketize(rows, self._stops, right=True))

    @cached_property
    def _stops(self) -> Tensor:
        import torch

        return torch.tensor([self.stop(rank) for rank in range(self.world_size)])
