"""Progress on standard error."""

from __future__ import annotations

import sys

from tqdm import tqdm

_LINE_S = 10.0


def shown_bar(total: int, unit: str) -> tqdm[None]:
    """A bar on a terminal, after a second; elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, unit_scale=True, delay=1.0)
    return _Lines(
        total=total, unit=unit, unit_scale=True, delay=_LINE_S, mininterval=_LINE_S, leave=False, ncols=0
    )


class _Lines(tqdm):  # type: ignore[misc]  # tqdm is not typed
    """Prints lines for a log file, where a bar could not overwrite itself."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state. An empty message asks to clear the bar; a line stays."""
        if msg is None:
            print(self, file=self.fp, flush=True)
