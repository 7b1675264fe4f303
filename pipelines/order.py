"""The order of the instances: a permutation by (seed, epoch) with random access, cut into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.hashing import Words, hash_words
from pipelines.settings import check_range

_ROUNDS = 8
_MIN_BITS = 4  # a half of a single bit mixes badly: some orders would be visibly likelier than others


class Request(NamedTuple):
    """One local batch to load.

    Attributes:
        epoch: Epoch the batch belongs to; it keys the augmentation.
        rows: int64 (b,), rows of the manifest, that is, instance ids.
    """

    epoch: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which instances a rank sees at a step: a pure function of (seed, epoch, step, rank).

    Every epoch is a pseudorandom permutation of all instances. Step s takes positions [s·G, (s+1)·G) of it,
    and rank r of W the r-th of W equal slices of those. Hence the global batch does not depend on W, no
    instance is seen twice in an epoch, and any step is reached without replaying the ones before it. The n
    mod G instances at the end of the permutation are left out; they are other ones in every epoch.
    """

    num_instances: int
    """Rows of the manifest, n."""
    global_batch: int
    """Images per step over all ranks, G."""
    seed: int
    """Key of the permutations."""
    world_size: int = 1
    """Number of ranks, W; must divide `global_batch`."""
    rank: int = 0
    """This rank, 0 to W - 1."""

    def __post_init__(self) -> None:
        """Check the numbers against each other.

        Raises:
            DataError: If no whole global batch fits into an epoch, or it cannot be shared equally.
            ValueError: If `rank` is not one of `world_size` ranks, or a size is not positive.
        """
        check_range(self, "global_batch", "world_size", at_least=1)
        check_range(self, "rank", at_least=0, at_most=self.world_size - 1)
        if self.global_batch % self.world_size:
            multiple = -(-self.global_batch // self.world_size) * self.world_size
            raise DataError(
                f"a global batch of {self.global_batch} cannot be shared equally by {self.world_size} "
                f"workers: set the global batch to a multiple of {self.world_size}, such as {multiple}"
            )
        if self.num_instances < self.global_batch:
            raise DataError(
                f"{self.num_instances} images are fewer than one global batch of {self.global_batch}: "
                f"set the global batch to at most {self.num_instances}, or provide more images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_instances // self.global_batch

    @property
    def local_batch(self) -> int:
        """Images per step of one rank."""
        return self.global_batch // self.world_size

    def rows(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Return this rank's rows of a step.

        Args:
            epoch: Epoch, from 0.
            step: Step within the epoch, in [0, `steps_per_epoch`).

        Returns:
            int64 (`local_batch`,), distinct rows in [0, `num_instances`).

        Raises:
            ValueError: If the epoch has no such step.
        """
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(
                f"no step {step} in epoch {epoch}: an epoch has steps 0 to {self.steps_per_epoch - 1}, "
                f"epochs count from 0"
            )
        start = step * self.global_batch + self.rank * self.local_batch
        positions = np.arange(start, start + self.local_batch, dtype=np.uint64)
        return _permute(positions, self.num_instances, hash_words(self.seed, epoch)).astype(np.int64)

    def requests(self, epoch: int = 0, step: int = 0, num_epochs: int | None = None) -> Iterator[Request]:
        """Yield this rank's batches from (epoch, step) on.

        Args:
            epoch: Epoch of the first batch.
            step: Its step within the epoch; `steps_per_epoch` means the start of the next epoch, which is
                where a run stands that was saved at the end of one.
            num_epochs: The stream ends before this epoch (a total, not counted from `epoch`); endless if
                None.

        Raises:
            ValueError: On the first batch, if the epoch has no such step.
        """
        if step == self.steps_per_epoch:
            epoch, step = epoch + 1, 0
        while num_epochs is None or epoch < num_epochs:
            yield Request(epoch, self.rows(epoch, step))
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = epoch + 1, 0


def _permute(positions: Words, size: int, key: Words) -> Words:
    """Apply a keyed permutation of range(size) to each position.

    A Feistel network permutes the next power of two; positions that leave the range are permuted again until
    they are back in it ("cycle walking", Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It
    is a bijection of range(size), needs no memory and takes less than two passes on average.

    Args:
        positions: uint64 (b,), each below `size`.
        size: Number of elements permuted.
        key: uint64 (1,), selects the permutation.

    Returns:
        uint64 (b,), the images of the positions.
    """
    bits = max(_MIN_BITS, (size - 1).bit_length())
    round_keys = hash_words(key, np.arange(_ROUNDS))
    result = _feistel(positions, bits, round_keys)
    while len(outside := np.flatnonzero(result >= size)):
        result[outside] = _feistel(result[outside], bits, round_keys)
    return result


def _feistel(words: Words, bits: int, round_keys: Words) -> Words:
    """Permute the `bits`-bit words: each round replaces (left, right) by (right, left ^ hash(right))."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = words >> np.uint64(right_bits), words & np.uint64((1 << right_bits) - 1)
    for key in round_keys:  # an even number of rounds: the halves swap widths in each
        left, right = right, left ^ (hash_words(key, right) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(right_bits) | right
