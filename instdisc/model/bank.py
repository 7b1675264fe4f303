"""One rank's rows of the memory bank: a unit vector for every instance that this rank owns."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from instdisc.common.errors import ConfigError
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
    generator = torch.Generator()
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        generator.manual_seed(derive_seed(seed, "bank", block))
        values = torch.randn(_BLOCK_ROWS, dim, generator=generator)
        first = block * _BLOCK_ROWS
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        rows[low - start : high - start] = F.normalize(values[low - first : high - first], dim=1)
    return rows


def check_memory(
    num_rows: int, dim: int, dtype: torch.dtype, device: torch.device, sharing: int, copies: int
) -> None:
    """Refuse a shard that the device cannot hold or compute with, before anything of its size is made.

    Args:
        num_rows: S, rows of the shard.
        dim: D.
        dtype: Of the rows.
        device: Where they are kept.
        sharing: Ranks that share the device's memory.
        copies: Float32 tables of the same shape that the objective keeps beside the bank.

    Raises:
        ConfigError: Names what is needed and what is free.
    """
    try:
        probe = torch.ones(1, 1, dtype=dtype, device=device)
        supported = device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)
        torch.mm(probe, probe)
    except RuntimeError:
        supported = False
    name = str(dtype).removeprefix("torch.")
    if not supported:
        raise ConfigError(f"{device.type} cannot compute with a bank of {name}: use --bank.dtype float32")
    needed = num_rows * dim * (dtype.itemsize + 4 * copies)
    if device.type == "cpu":
        needed *= 2  # a snapshot is written from a copy
    room = available_bytes(device) // sharing
    if needed > room:
        raise ConfigError(
            f"the {num_rows:,} rows of a rank, {dim} {name} numbers each, need {needed / 1e9:.1f} GB and "
            f"{room / 1e9:.1f} GB are free: use more workers on other machines (at most "
            f"{room * num_rows // needed:,} rows fit here), a half-precision --bank.dtype or a smaller "
            "--backbone.embedding-dim"
        )


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the host, what the machine and the container's limit leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    # Files that were read count as used until the memory is wanted.
    files = int(statistics["inactive_file"]) + int(statistics["active_file"])
    return min(free, limit - used + files)


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
    def update(self, instance_ids: Tensor, embeddings: Tensor, *, momentum: float) -> None:
        """Row ← normalise(momentum · row + (1 - momentum) · embedding), computed in float32.

        Wu et al. 2018 replace the row (momentum 0); their public code mixes with momentum 0.5.

        Args:
            instance_ids: int64 (R,), all owned by this shard, none twice.
            embeddings: (R, D), unit rows.
            momentum: 0 … 1.
        """
        positions = instance_ids - self.start
        old = self.rows[positions].float()
        mixed = torch.lerp(embeddings.float(), old, momentum)
        self.rows[positions] = F.normalize(mixed, dim=1).to(self.rows.dtype)
