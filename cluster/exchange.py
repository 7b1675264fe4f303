"""Moving rows between ranks: queries to every owner, partial results back, updated rows to their owner.

Rows of a partitioned table never leave their owner; what travels is proportional to the global batch. The
functions work alike on gloo and NCCL: rows of any dtype travel as bytes, so no backend has to know the dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.partition import Partition
from cluster.phases import Phases

P = ParamSpec("P")
R = TypeVar("R")


def _timed(collective: Callable[Concatenate[Exchange, P], R]) -> Callable[Concatenate[Exchange, P], R]:
    """Count the time of a collective as the phase `exchange`."""

    @functools.wraps(collective)
    def timed(exchange: Exchange, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with exchange.phases("exchange"):
            return collective(exchange, *args, **kwargs)

    return timed


class Exchange:
    """The collectives of one training step, and the bytes that this rank sent in them.

    With a world of one rank no process group is needed, nothing is copied and nothing is sent.

    Args:
        rank: This process, 0 … world_size - 1.
        world_size: Ranks in the default process group, which must be initialised when there are several.
        phases: Where the time of the collectives is counted, as `exchange`.
    """

    def __init__(self, rank: int, world_size: int, phases: Phases | None = None) -> None:
        self.rank = rank
        self.phases = phases or Phases(torch.device("cpu"))
        self.world_size = world_size
        self.sent_bytes = 0

    def announce(self, ids: Tensor, *, flag: int) -> Announcement:
        """Begin to tell all ranks the ids of this rank's batch, and a flag.

        Both are known to the host, and what follows from them is host's work: they travel between the hosts (by gloo,
        whatever device the group is for) while the devices compute.

        Args:
            ids: int64 (B,) on the CPU; B the same on every rank.
            flag: Anything that concerns all ranks as soon as it does one; 0 for nothing, the largest counts.

        Collectives: one all-gather on the CPU, which `Announcement` waits for; every rank must call.
        """
        mine = torch.cat([ids, torch.tensor([flag])])
        if self.world_size == 1:
            return Announcement(mine[None], None)
        everything = mine.new_empty(self.world_size, len(mine))
        work = dist.all_gather_into_tensor(everything, mine[None], async_op=True)
        self.sent_bytes += mine.numel() * mine.element_size() * (self.world_size - 1)
        return Announcement(everything, work)

    @_timed
    def gather(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Every rank's rows and ids, in the order of the ranks.

        Args:
            rows: (B, D), any dtype; B and D the same on every rank.
            ids: int64 (B,).

        Returns:
            (W·B, D) and int64 (W·B,).

        Collectives: one all-gather; every rank must call.
        """
        if self.world_size == 1:
            return rows, ids
        packed = torch.cat([_as_bytes(rows), _as_bytes(ids[:, None])], dim=1)
        gathered = packed.new_empty(self.world_size * len(packed), packed.shape[1])
        dist.all_gather_into_tensor(gathered, packed)
        self.sent_bytes += packed.numel() * (self.world_size - 1)
        row_bytes = packed.shape[1] - ids.element_size()
        return (
            gathered[:, :row_bytes].contiguous().view(rows.dtype),
            gathered[:, row_bytes:].contiguous().view(ids.dtype)[:, 0],
        )

    @_timed
    def to_askers(self, partials: Tensor) -> Tensor:
        """Each owner's partial results, back at the rank that asked.

        Args:
            partials: (W·B, C), this owner's part for the queries of all ranks, as `gather` ordered them.

        Returns:
            (W, B, C): for this rank's own queries, the part of every owner.

        Collectives: one all-to-all; every rank must call.
        """
        partials_WBC = partials.view(self.world_size, -1, *partials.shape[1:])
        if self.world_size == 1:
            return partials_WBC
        received = torch.empty_like(partials_WBC, memory_format=torch.contiguous_format)
        dist.all_to_all_single(_as_bytes(received), _as_bytes(partials_WBC))
        self.sent_bytes += (
            partials.element_size() * partials.numel() * (self.world_size - 1) // self.world_size
        )
        return received

    @_timed
    def route(self, rows: Tensor, ids_of_all_ranks: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
        """Send each row to the rank that owns its id.

        The receiver knows from `ids_of_all_ranks` what will come, so neither ids nor counts travel.

        Args:
            rows: (B, D), any dtype: the rows of this rank's ids.
            ids_of_all_ranks: int64 (W·B,) on the CPU, in the order of the ranks as `gather` returns them; rows of the
                partitioned table, negative ones are dropped with their row.
            partition: Who owns which id.

        Returns:
            The ids that this rank owns, int64 (R,), and their rows (R, D), ordered by the rank that sent them, on the
            device of the rows.

        Collectives: one all-to-all with uneven splits; every rank must call.
        """
        owners_WB = partition.owners(ids_of_all_ranks).view(self.world_size, -1)
        owners_B = owners_WB[self.rank]
        owned_ids = ids_of_all_ranks[owners_WB.flatten() == self.rank]
        order = torch.argsort(owners_B, stable=True)[(owners_B < 0).sum() :]
        both = to_device(torch.cat([order, owned_ids]), rows.device)
        order, owned_ids = both[: len(order)], both[len(order) :]
        outgoing = rows[order]
        if self.world_size == 1:
            return owned_ids, outgoing
        send_counts = torch.bincount(owners_B[owners_B >= 0], minlength=self.world_size).tolist()
        receive_counts = (owners_WB == self.rank).sum(dim=1).tolist()
        incoming = rows.new_empty(len(owned_ids), rows.shape[1])
        dist.all_to_all_single(_as_bytes(incoming), _as_bytes(outgoing), receive_counts, send_counts)
        sent_rows = len(outgoing) - send_counts[self.rank]
        self.sent_bytes += sent_rows * rows.shape[1] * rows.element_size()
        return owned_ids, incoming

    @_timed
    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks.

        Args:
            values: floating point, any shape, the same on every rank; not changed.

        Collectives: one all-reduce; every rank must call.
        """
        return self._all_reduce(values, dist.ReduceOp.SUM)

    @_timed
    def log_sum_exp(self, values: Tensor) -> Tensor:
        """Elementwise `log Σ exp` over the ranks.

        Args:
            values: floating point, any shape, the same on every rank; not changed.

        Collectives: one all-gather; every rank must call.
        """
        if self.world_size == 1:
            return values
        gathered = values.new_empty(self.world_size, *values.shape)
        dist.all_gather_into_tensor(gathered, values.contiguous()[None])
        self.sent_bytes += values.numel() * values.element_size() * (self.world_size - 1)
        return torch.logsumexp(gathered, dim=0)

    @_timed
    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the ranks.

        Args:
            values: any number type and shape, the same on every rank; not changed.

        Collectives: one all-reduce; every rank must call.
        """
        return self._all_reduce(values, dist.ReduceOp.MAX)

    @_timed
    def barrier(self) -> None:
        """Wait until every rank is here.

        Collectives: one barrier; every rank must call.
        """
        if self.world_size > 1:
            dist.barrier()

    def _all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = values.clone()
        dist.all_reduce(reduced, operation)
        # What a ring sends; backends that use a tree for small tensors send about as much.
        self.sent_bytes += (
            2 * values.numel() * values.element_size() * (self.world_size - 1) // self.world_size
        )
        return reduced


class Announcement:
    """What all ranks announced; see `Exchange.announce`. Whoever asks first waits for the hosts of the other ranks."""

    def __init__(self, everything: Tensor, work: Any) -> None:
        self._everything, self._work = everything, work

    @property
    def ids(self) -> Tensor:
        """int64 (W, B) on the CPU, by rank."""
        return self._arrived()[:, :-1]

    @property
    def flag(self) -> int:
        """The largest flag of all ranks."""
        return int(self._arrived()[:, -1].max())

    def _arrived(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._everything


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to a device; a GPU fetches it from pinned memory, and the host does not wait."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy from a device to the CPU; only calling what is returned, which gives the copy, waits for it."""
    if values.device.type != "cuda":
        return lambda: values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


def _as_bytes(rows: Tensor) -> Tensor:
    """The same memory as unsigned bytes, last dimension widened."""
    return rows.contiguous().view(torch.uint8)
