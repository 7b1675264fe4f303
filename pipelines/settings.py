"""Settings of the loader, and how numbers are checked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def check_range(
    settings: object, *names: str, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Check fields that hold a finite number, a tuple of them or None.

    Raises:
        ValueError: With the field, its value and the range.
    """
    bounds = {"at least": at_least, "at most": at_most}
    expected = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound))
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(math.isfinite(number) and at_least <= number <= at_most for number in numbers):
            raise ValueError(f"{name} is {value}, expected {expected or 'finite'}")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where a node keeps tars of object storage, and how many bytes of them."""

    folder: Path
    """On the node's own disk."""
    most_bytes: int
    """Of all files in it."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are produced; what is in them does not depend on it, up to the rounding of a decoder."""

    backend: Literal["auto", "dali", "host"] = "auto"
    """`dali` needs the extra of that name; `host` needs Pillow only; `auto` takes DALI where installed."""
    threads: int | None = None
    """Threads that decode; by default the cores this process may use, or OMP_NUM_THREADS if that is fewer."""
    prefetch: int = 3
    """Batches prepared ahead of the consumer."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: If a field lies outside its range.
        """
        if self.backend not in ("auto", "dali", "host"):
            raise ValueError(f"backend is {self.backend!r}, expected auto, dali or host")
        check_range(self, "threads", "prefetch", at_least=1)

    def available_threads(self) -> int:
        """Return `threads`, or its default."""
        if self.threads is not None:
            return self.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limit = os.environ.get("OMP_NUM_THREADS", "")
        return min(cores, int(limit)) if limit.isdigit() and int(limit) > 0 else cores
