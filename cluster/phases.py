"""How the time of a step divides over its phases, on the clock of the device that does the work."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

_UNNAMED = ""
_MOST_PENDING = 8

_Mark = tuple[str, Any]
"""Name of the phase that begins, and when: seconds, or an event in the GPU's stream."""


class Phases:
    """Sums the time of each named phase of a step. A phase within another counts for itself alone.

    Work on a GPU is timed by events in its stream, which are read once they have passed: nothing waits for the GPU.
    Results therefore come a step or so later there; on the CPU at once.

        phases.begin_step()
        with phases("exchange"):
            …
        for seconds in phases.finish_step():    # one dict per step, oldest first
            …

    Args:
        device: Where the timed work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[_Mark] = []
        self._names = [_UNNAMED]
        self._pending: deque[list[_Mark]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done within as the phase `name`."""
        self._enter(name)
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()
            self._enter(self._names[-1])

    def begin_step(self) -> None:
        """Begin a step; what was timed since the end of the last one is dropped."""
        self._marks = []

    def finish_step(self) -> list[dict[str, float]]:
        """End the step.

        Returns:
            Seconds by phase of every step that has passed since the last call.
        """
        if self._marks:
            self._pending.append(self._marks)
            self._marks = []
        finished = []
        while self._pending and (self._has_passed(self._pending[0]) or len(self._pending) > _MOST_PENDING):
            finished.append(self._seconds(self._pending.popleft()))
        return finished

    def _enter(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _has_passed(self, marks: list[_Mark]) -> bool:
        return not self._on_gpu or bool(marks[-1][1].query())

    def _seconds(self, marks: list[_Mark]) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            marks[-1][1].synchronize()  # returns at once, unless more steps are pending than may be
        for (name, start), (_, end) in pairwise(marks):
            if name != _UNNAMED:
                seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(seconds)
