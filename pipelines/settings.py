"""Settings of the loader."""

import os
from dataclasses import dataclass
from typing import Literal


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
            raise ValueError(f"backend={self.backend!r}: expected auto, dali or host")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: must be at least 1, or None for all cores available")
        if self.prefetch < 1:
            raise ValueError(f"prefetch={self.prefetch}: must be at least 1")

    def available_threads(self) -> int:
        """Return `threads`, or its default."""
        if self.threads is not None:
            return self.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limit = os.environ.get("OMP_NUM_THREADS", "")
        return min(cores, int(limit)) if limit.isdigit() and int(limit) > 0 else cores
