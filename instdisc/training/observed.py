"""What a step reports: summed over parts and ranks on the device, read by the host when it has arrived."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.exchange import Exchange, to_host
from instdisc.common.errors import NonFiniteError
from instdisc.objectives.base import Result


class Observed(NamedTuple):
    """What was seen of a part, a step or all ranks' step, as one vector that can be summed.

    Attributes:
        names: Of the objective's sums.
        values: float64: those sums, the number of embeddings, and for every rank whether it saw a non-finite number.
    """

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, result: Result, ids: Tensor, embeddings: Tensor, exchange: Exchange) -> Observed:
        """Of a part on this rank."""
        sums = torch.stack([*result.sums.values()])
        flags = sums.new_zeros(exchange.world_size)
        norm = result.sums["embedding_norm"]  # an infinite one makes an embedding of zeros
        flags[exchange.rank] = ~(
            torch.isfinite(embeddings).all() & torch.isfinite(result.loss_Q).all() & torch.isfinite(norm)
        )
        return cls(tuple(result.sums), torch.cat([sums, (ids >= 0).sum().double()[None], flags]))

    @classmethod
    def total(cls, parts: list[Observed]) -> Observed:
        """Of all parts on this rank."""
        return cls(parts[0].names, torch.stack([part.values for part in parts]).sum(dim=0))

    @property
    def num_embeddings(self) -> Tensor:
        """Those that have an image, float64, a scalar."""
        return self.values[len(self.names)]

    @property
    def is_finite(self) -> Tensor:
        """Whether no rank saw a non-finite number, bool, a scalar."""
        return ~self.values[len(self.names) + 1 :].any()

    def means(self) -> dict[str, Tensor]:
        """The sums over the number of embeddings, or over 1 if there was none."""
        means = self.values[: len(self.names)] / self.num_embeddings.clamp(min=1)
        return dict(zip(self.names, means.unbind(), strict=True))


class StepReport(NamedTuple):
    """What a step did, as the host knows it.

    Attributes:
        step: Its number, from 1.
        learning_rate: Its rate.
        means: Over the embeddings of the global batch: `loss`, what else the objective reports, `negative_similarity`,
            `embedding_norm`; and `gradient_norm`. Empty if no image could be decoded.
        numbers: Of the objective after the step; see `Objective.numbers`.
    """

    step: int
    learning_rate: float
    means: dict[str, float]
    numbers: dict[str, float]


class UnreadReport:
    """A report on its way from the device to the host.

    Args:
        step: Number of the step, from 1.
        learning_rate: Of the step.
        observed: By all ranks.
        gradient_norm: A scalar.
        numbers: Of the objective after the step.
    """

    def __init__(
        self,
        step: int,
        learning_rate: float,
        observed: Observed,
        gradient_norm: Tensor,
        numbers: dict[str, Tensor],
    ) -> None:
        self._step, self._learning_rate = step, learning_rate
        self._names, self._number_names = observed.names, tuple(numbers)
        values = [observed.values, *(value.double()[None] for value in (gradient_norm, *numbers.values()))]
        self._arriving = to_host(torch.cat(values))

    def wait(self) -> None:
        """Wait until it has arrived."""
        self._arriving()

    def read(self) -> StepReport:
        """What it says, once it has arrived.

        Raises:
            NonFiniteError: Some rank saw a non-finite number, and which; or the gradient is not finite.
        """
        values: list[float] = self._arriving().tolist()
        split = len(values) - len(self._number_names)
        *totals, gradient_norm = values[:split]
        *sums, count = totals[: len(self._names) + 1]
        flags = totals[len(self._names) + 1 :]
        ranks = [rank for rank, flag in enumerate(flags) if flag]
        if ranks:
            raise NonFiniteError(
                f"loss or embeddings are not finite on rank {', '.join(map(str, ranks))} of {len(flags)}"
            )
        if not math.isfinite(gradient_norm):
            raise NonFiniteError("the gradient is not finite on any rank")
        means: dict[str, float] = {}
        if count:
            means = {name: value / count for name, value in zip(self._names, sums, strict=True)}
            means["gradient_norm"] = gradient_norm
        numbers = dict(zip(self._number_names, values[split:], strict=True))
        return StepReport(self._step, self._learning_rate, means, numbers)
