"""Whether a rank's part of the run fits, on its GPU and on the host, worked out before the first step."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.group import Worker
from instdisc.common.errors import ConfigError

# CUDA itself, the libraries' workspaces and the decoder: an estimate, as it depends on the GPU and the images.
_OVERHEAD_BYTES = 2 << 30
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class BankShard:
    """The rows that a rank keeps.

    Attributes:
        num_rows: S.
        dim: D.
        dtype: Of the bank.
        copies: Float32 tables of the same shape that the objective keeps beside the bank.
    """

    num_rows: int
    dim: int
    dtype: torch.dtype
    copies: int

    @property
    def num_bytes(self) -> int:
        """Of bank and tables."""
        return self.num_rows * self.dim * (self.dtype.itemsize + _FLOAT32_BYTES * self.copies)


def check_memory(shard: BankShard, worker: Worker, besides: int = 0) -> None:
    """Refuse a shard that cannot be held or computed with, before anything of its size is made.

    Args:
        shard: Of this rank.
        worker: This rank.
        besides: Bytes that network and batches take on a GPU; see `network_bytes`.

    Raises:
        ConfigError: With what is needed and what there is.
    """
    device, name = worker.device, str(shard.dtype).removeprefix("torch.")
    if not _can_compute(device, shard.dtype):
        raise ConfigError(f"{device.type} cannot compute with a bank of {name}: use --bank.dtype float32")
    rows = f"the {shard.num_rows:,} rows of a rank, {shard.dim} {name} numbers each,"
    remedies = "a half-precision --bank.dtype or a smaller --backbone.embedding-dim"
    # On the host too: a snapshot is written from a copy there.
    needed = shard.num_bytes if device.type == "cuda" else 2 * shard.num_bytes
    room = host_bytes() // worker.local_world_size
    if needed > room:
        copies = " of the host for the copy that a snapshot is written from" if device.type == "cuda" else ""
        raise ConfigError(
            f"{rows} need {needed / 1e9:.1f} GB{copies} and {room / 1e9:.1f} GB are free: use more workers on other "
            f"machines (at most {room * shard.num_rows // needed:,} rows fit here), {remedies}"
        )
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    besides += _OVERHEAD_BYTES
    if shard.num_bytes + besides > free:
        fitting = max(0, free - besides) * shard.num_rows // shard.num_bytes
        raise ConfigError(
            f"{rows} need {shard.num_bytes / 1e9:.1f} GB of the GPU, network, batches and CUDA about "
            f"{besides / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: use more GPUs (at most {fitting:,} rows fit "
            f"here), a larger --training.accumulation, a smaller --training.batch-size, {remedies}"
        )


def network_bytes(embedder: nn.Module, images: tuple[int, ...], arithmetic: torch.dtype, batches: int) -> int:
    """What training a network takes on a GPU: weights, gradients, momentum, activations and batches.

    The activations are those that a forward pass keeps for the backward pass, counted on tensors without memory.

    Args:
        embedder: The network.
        images: Shape (Q, 3, H, W) of what passes through it at a time.
        arithmetic: Its type.
        batches: Of float32 images of that shape that exist at a time.
    """
    network = copy.deepcopy(embedder).to("meta").train()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # else another tensor could take its place in the table
        return tensor

    held: list[Tensor] = []
    inputs = torch.empty(images, device="meta")
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        suppress(NotImplementedError),
    ):
        network(inputs)  # some networks work out their sizes with tensors that need memory
    parameters = list(network.parameters())
    for parameter in parameters:
        kept.pop(parameter.untyped_storage()._cdata, None)
    weights = sum(parameter.numel() for parameter in parameters) * _FLOAT32_BYTES
    activations = sum(kept.values()) * arithmetic.itemsize // _FLOAT32_BYTES
    return 3 * weights + activations + batches * inputs.numel() * _FLOAT32_BYTES


def host_bytes() -> int:
    """Free memory of the host: what the machine and the container's limit leave."""
    free = _available_bytes()
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    # Files that were read count as used until the memory is wanted.
    files = int(statistics["inactive_file"]) + int(statistics["active_file"])
    return min(free, limit - used + files)


def _available_bytes() -> int:
    """What the machine could give: files that were read make room."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _can_compute(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        probe = torch.ones(1, 1, dtype=dtype, device=device)
        torch.mm(probe, probe)
    except RuntimeError:
        return False
    return device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)
