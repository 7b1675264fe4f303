"""One seed in, many independent ones out."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A seed for one purpose, say `derive_seed(seed, "negatives", step, rank)`.

    Returns:
        0 … 2**63 - 1, a pure function of the arguments, unrelated for different arguments.
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
