"""How long the steps of a run take, and how much of it is waiting for images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


class Clock:
    """Times the steps, each from asking for a batch to its end; what happens between steps does not count.

    Fractions and speeds skip the first step, which starts the loader and compiles.

    Attributes:
        train_seconds: Over all steps, earlier parts of the run included.
        waited: Seconds that the last step waited for its batch.

    Args:
        train_seconds: Of earlier parts of the run.
    """

    def __init__(self, train_seconds: float = 0.0) -> None:
        self.train_seconds = train_seconds
        self.waited = 0.0
        self._first_step = True
        self._run = _Spent()
        self._lap = _Spent()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for a batch, which begins a step."""
        self._started = time.perf_counter()
        yield
        self.waited = time.perf_counter() - self._started

    def tick(self, images: int) -> float:
        """Call at the end of a step, with its number of images; returns its seconds."""
        seconds = time.perf_counter() - self._started
        self.train_seconds += seconds
        if not self._first_step:
            self._run.add(seconds, self.waited, images)
            self._lap.add(seconds, self.waited, images)
        self._first_step = False
        return seconds

    def lap(self) -> tuple[float, float]:
        """Images per second and fraction of the time spent waiting since the last call."""
        spent, self._lap = self._lap, _Spent()
        return spent.images_per_second, spent.wait_fraction

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first."""
        return self._run.images_per_second

    @property
    def wait_fraction(self) -> float:
        """Over all steps but the first."""
        return self._run.wait_fraction


@dataclass
class _Spent:
    """Sums over steps."""

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0

    def add(self, seconds: float, waited: float, images: int) -> None:
        self.seconds += seconds
        self.waited += waited
        self.images += images

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_fraction(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0
