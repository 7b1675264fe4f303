"""A plugin of coverage: Ray ends its workers without letting them write what they measured, so they do it meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import coverage


def coverage_init(_registry: Any, _options: dict[str, Any]) -> None:
    """Called by coverage in every process that it measures."""
    if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
        threading.Thread(target=_save_often, daemon=True).start()


def _save_often() -> None:
    while True:
        time.sleep(1)
        measuring = coverage.Coverage.current()
        if measuring is not None:
            measuring.save()
