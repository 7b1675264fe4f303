"""The buffers of a network, such as running statistics: kept before a step, put back, averaged over the ranks."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cluster.exchange import Exchange


class Buffers:
    """All buffers of a network, copied together: on a GPU a copy of each alone would be a launch of its own.

    Args:
        network: Its buffers are written in place, by name.
        exchange: Of the ranks.
    """

    def __init__(self, network: nn.Module, exchange: Exchange) -> None:
        by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
        for name, buffer in network.named_buffers():
            by_dtype[buffer.dtype][name] = buffer
        self._exchange = exchange
        self._groups = [_Group(named) for named in by_dtype.values()]
        self._statistics = [
            group for dtype, group in zip(by_dtype, self._groups, strict=True) if dtype.is_floating_point
        ]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present values."""
        for group in self._groups:
            torch._foreach_copy_(group.parts_of(group.kept), group.buffers)

    @torch.no_grad()
    def put_back_unless(self, sound: Tensor) -> None:
        """Where `sound`, a bool scalar on the device, is false, return to the values of the last `keep`."""
        for group in self._groups:
            torch.where(sound, group.flat(), group.kept, out=group.kept)
            torch._foreach_copy_(group.buffers, group.parts_of(group.kept))

    def statistics(self) -> dict[str, Tensor]:
        """This rank's running statistics, the buffers of floating point, by name, copied to the CPU."""
        return self._named(_Group.flat)

    def averaged_statistics(self) -> dict[str, Tensor]:
        """The mean of the ranks' running statistics, which each gathered from its own images, on the CPU.

        Collectives: one all-reduce for each type of floating point; every rank must call.
        """
        return self._named(self._mean)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network has the averaged running statistics; afterwards this rank's own again.

        Collectives: one all-reduce for each type of floating point; every rank must call.
        """
        own = [group.flat() for group in self._statistics]
        for group in self._statistics:
            torch._foreach_copy_(group.buffers, group.parts_of(self._mean(group)))
        try:
            yield
        finally:
            for group, values in zip(self._statistics, own, strict=True):
                torch._foreach_copy_(group.buffers, group.parts_of(values))

    def _named(self, values: Callable[[_Group], Tensor]) -> dict[str, Tensor]:
        return {
            name: part
            for group in self._statistics
            for name, part in zip(group.names, group.parts_of(values(group).cpu()), strict=True)
        }

    def _mean(self, group: _Group) -> Tensor:
        return self._exchange.sum(group.flat()) / self._exchange.world_size


class _Group:
    """Buffers of one dtype.

    Attributes:
        kept: As many numbers, flat, for remembered values.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.names, self.buffers = list(named), list(named.values())
        self.kept = self.flat()

    def flat(self) -> Tensor:
        """A copy of all numbers in one row."""
        return torch.cat([buffer.flatten() for buffer in self.buffers])

    def parts_of(self, flat: Tensor) -> list[Tensor]:
        """The parts of such a row, in the shapes of the buffers."""
        parts = torch.split(flat, [buffer.numel() for buffer in self.buffers])
        return [part.view_as(buffer) for part, buffer in zip(parts, self.buffers, strict=True)]
