"""Counter-based random numbers: a draw is a pure function of its keys, whatever the order of calls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def hash_words(*keys: int | npt.NDArray[np.integer]) -> Words:
    """Hash integer keys to uniform 64-bit words.

    The keys are absorbed in turn by the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators"); array keys broadcast against each other.

    Args:
        *keys: Integers of any sign, or integer arrays; their order matters.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    state = np.zeros(1, dtype=np.uint64)  # not a scalar: NumPy warns when a scalar overflows
    for key in keys:
        word = np.uint64(key & _MASK) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
        state = (state ^ word) + _INCREMENT
        state = (state ^ (state >> _SHIFTS[0])) * _FACTORS[0]
        state = (state ^ (state >> _SHIFTS[1])) * _FACTORS[1]
        state = state ^ (state >> _SHIFTS[2])
    return state


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Map uniform 64-bit words to uniform numbers in [0, 1), from their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
