"""Who votes in weighted kNN, how many of them, and leave-one-out without its bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instdisc.common.seeding import derive_seed

MOST_NEIGHBORS = 200
"""k of the papers (Wu et al. 2018, section 3.4), which the rule keeps where classes have 134 rows or more."""
_MOST_LEFT_OUT = 10_000
_SPARE = 16  # neighbors beyond 2k of which some are left out
_SMALL_CLASSES = 0.01  # share of the rows that the smallest classes, which k disregards, hold together

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Voters:
    """The labeled rows that classify queries, V of them.

    Leave-one-out as usually done falls below chance: the query's class has one row fewer than its share, and where
    similarities are almost equal, votes count rows. Here a query that is itself a row leaves out one row of *every*
    class, itself of its own. What is left has the same number of rows of each class whatever the class of the query, so
    features without information are right as often as the same answers in any other order.

    Attributes:
        rows: int64 (V,), ascending, rows of the bank.
        labels: int64 (V,), their classes, 0 or above.
        leave_one_out: Whether the queries are themselves among the voters.
    """

    rows: Ids
    labels: Ids
    leave_one_out: bool

    def __len__(self) -> int:
        return len(self.rows)

    def neighbors(self, asked: int | None = None) -> int:
        """The number k of neighbors that vote.

        A class that is well apart from the others keeps the majority as long as k is below twice its rows, and more
        votes average out more noise: k is 1.5 times the rows of the smallest class, at least 1 and at most 200. The
        smallest classes that hold at most 1% of the rows together are disregarded.

        Args:
            asked: Another k; at most as many as there are voters.
        """
        if asked is not None:
            return max(1, min(asked, len(self)))
        counts = np.sort(self.sizes[self.sizes > 0])
        small = np.cumsum(counts) <= _SMALL_CLASSES * len(self)
        smallest = int(counts[small.sum()]) - self.leave_one_out if len(counts) else 0
        return max(1, min(3 * smallest // 2, MOST_NEIGHBORS))

    def searched(self, k: int) -> int:
        """How many nearest voters to look for so that k of them may vote."""
        return min(2 * k + _SPARE if self.leave_one_out else k, len(self))

    def voting(
        self, scores_QK: Tensor, voters_QK: Tensor, queries_Q: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        """The k nearest voters of each query that may vote for it.

        Args:
            scores_QK: float32 (Q, K), largest first, minus infinity for no voter.
            voters_QK: int64 (Q, K), positions among the voters; negative for none.
            queries_Q: int64 (Q,), position among the voters of each query, for leave-one-out; otherwise None.
            k: How many vote.

        Returns:
            Scores and positions, (Q, min(k, K)); minus infinity and -1 where fewer may vote.
        """
        if queries_Q is not None:
            turns, sizes = torch.from_numpy(self.turns), torch.from_numpy(self.sizes[self.labels])
            places_QK = voters_QK.cpu().clamp(min=0)
            left_out_QK = turns[places_QK] == turns[queries_Q.cpu()][:, None] % sizes[places_QK]
            scores_QK = scores_QK.masked_fill(left_out_QK.to(scores_QK.device), -torch.inf)
            scores_QK, order_QK = scores_QK.sort(dim=1, descending=True, stable=True)
            voters_QK = voters_QK.gather(1, order_QK)
        scores_Qk = scores_QK[:, :k]
        return scores_Qk, voters_QK[:, :k].masked_fill(scores_Qk == -torch.inf, -1)

    def labels_of(self, voters_QK: Tensor) -> Tensor:
        """Classes of voters by position, int64 of any shape; negative for none."""
        labels = torch.from_numpy(self.labels)[voters_QK.cpu().clamp(min=0)].to(voters_QK.device)
        return labels.masked_fill(voters_QK < 0, -1)

    def spread(self, most: int = _MOST_LEFT_OUT) -> Ids:
        """Positions of voters, by default up to 10,000, spread evenly: the queries of leave-one-out."""
        places = np.linspace(0, len(self) - 1, min(most, len(self)))
        return places.astype(np.int64)

    @cached_property
    def sizes(self) -> Ids:
        """int64 (C,), voters of every class."""
        return np.bincount(self.labels)

    @cached_property
    def turns(self) -> Ids:
        """int64 (V,), the place of each voter in a random order of its class; the same in every program."""
        shuffled = np.random.default_rng(derive_seed(0, "leave-one-out")).permutation(len(self))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        starts = np.cumsum(self.sizes) - self.sizes
        turns = np.empty(len(self), np.int64)
        turns[by_class] = np.arange(len(self)) - starts[self.labels[by_class]]
        return turns


def choose_voters(labels_N: npt.NDArray[np.integer], *, leave_one_out: bool, max_rows: int = 0) -> Voters:
    """The labeled rows, or a sample of them.

    Args:
        labels_N: (N,), negative for rows without a label.
        leave_one_out: Whether the queries are rows themselves.
        max_rows: Of more labeled rows than this, so many are drawn at random, always the same; 0 takes all.
    """
    rows = np.flatnonzero(np.asarray(labels_N) >= 0)
    if 0 < max_rows < len(rows):
        generator = np.random.default_rng(derive_seed(0, "knn-rows"))
        rows = np.sort(generator.choice(rows, max_rows, replace=False))
    return Voters(rows, np.asarray(labels_N)[rows].astype(np.int64), leave_one_out)
