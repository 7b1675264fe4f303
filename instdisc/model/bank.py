"""One rank's rows of the memory bank: a unit vector for every instance that this rank owns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from instdisc.common.seeding import derive_seed

_BLOCK_ROWS = 4096


def random_unit_rows(
    start: int,
    stop: int,
    dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Rows `start` … `stop` - 1 of an endless table of random unit vectors.

    A row depends on the seed and its number alone, so that the bank starts alike however it is partitioned.

    Returns:
        (stop - start, dim), each row uniform on the sphere; made block by block, so that nothing else is as large.
    """
    rows = torch.empty(stop - start, dim, dtype=dtype, device=device)

    def draw(block: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "bank", block))
        values = torch.randn(_BLOCK_ROWS, dim, generator=generator)
        first = block * _BLOCK_ROWS
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        rows[low - start : high - start] = F.normalize(values[low - first : high - first], dim=1)

    # PyTorch draws random numbers in one thread, a core of a GPU's many.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(draw, range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS))))
    return rows


class Bank:
    """The rows `start` … `stop` - 1 of the bank (Wu et al. 2018, section 3.1). Purely local; no collectives.

    Not an `nn.Module`: as a module's buffer it would be broadcast by DistributedDataParallel.

    Args:
        rows: (S, D), unit rows, float32, float16 or bfloat16; taken over, not copied.
        start: Instance id of the first row.
    """

    def __init__(self, rows: Tensor, start: int = 0) -> None:
        self.rows = rows
        self.start = start
        self.stop = start + len(rows)

    def local(self, instance_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where ids lie in this shard.

        Args:
            instance_ids: int64 (G,), -1 for none.

        Returns:
            Positions int64 (G,) in 0 … S - 1, meaningful only where the second, bool (G,), is true.
        """
        owned = (instance_ids >= self.start) & (instance_ids < self.stop)
        return torch.where(owned, instance_ids - self.start, 0), owned

    @torch.no_grad()
    def update(self, instance_ids: Tensor, embeddings: Tensor, *, momentum: float, sound: Tensor) -> None:
        """Row ← normalize(momentum · row + (1 - momentum) · embedding), computed in float32.

        Wu et al. 2018 replace the row (momentum 0); their public code mixes with momentum 0.5.

        Args:
            instance_ids: int64 (R,), all owned by this shard, none twice.
            embeddings: (R, D), unit rows.
            momentum: 0 … 1.
            sound: bool, a scalar on the device of the bank; where it is false the rows stay as they are.
        """
        positions = instance_ids - self.start
        old = self.rows[positions]
        mixed = torch.lerp(embeddings.float(), old.float(), momentum)
        new = F.normalize(mixed, dim=1).to(self.rows.dtype)
        self.rows[positions] = torch.where(sound, new, old)
