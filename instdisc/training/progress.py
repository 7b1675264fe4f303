"""One progress bar for the run, shown in the launching terminal, driven by the metrics file that rank 0 writes."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

_POLL_SECONDS = 0.5
_LINE_SECONDS = 10.0


class ProgressBar:
    """A context manager that follows a metrics file from a thread of its own.

    On a terminal the bar stays in its line; in a log a line appears every ten seconds.

    Args:
        metrics: The JSON-lines file. It is opened at once, so that it may be renamed later.
        final: Where it will be by the end; the same for a resumed run, whose lines so far are not shown again.
            Of a file that replaces it there, the lines that were not shown yet are.
    """

    def __init__(self, metrics: Path, final: Path) -> None:
        self._file = metrics.open()
        self._final = final
        self._shown = Counter(self._file if metrics == final else ())
        self._skipped: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar: tqdm[Any] | None = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._file.close()

    def _follow(self) -> None:
        line = ""
        while True:
            last_round = self._done.wait(_POLL_SECONDS)
            if os.fstat(self._file.fileno()).st_nlink == 0 and self._final.exists():
                self._file.close()
                self._file = self._final.open()
                self._skipped = self._shown.copy()
                line = ""
            # The end of a line that is still being written comes in a later round.
            while part := self._file.readline():
                line += part
                if line.endswith("\n"):
                    self._take(line)
                    line = ""
            if last_round:
                break
        if self._bar is not None:
            self._bar.close()

    def _take(self, line: str) -> None:
        if self._skipped[line] > 0:
            self._skipped[line] -= 1
            return
        self._shown[line] += 1
        with suppress(ValueError):  # cut short by a full disk
            self._show(json.loads(line))

    def _show(self, row: dict[str, Any]) -> None:
        if row["kind"] == "status":
            tqdm.write(row["message"], file=sys.stderr)
        elif row["kind"] == "knn":
            accuracy = ", ".join(
                _accuracy(row, name.removeprefix("knn_top1_")) for name in row if name.startswith("knn_top1")
            )
            tqdm.write(f"epoch {row['epoch']:.0f}: kNN top-1 {accuracy}", file=sys.stderr)
        elif row["kind"] == "label_free":
            of = f"epoch {row['epoch']:.0f}" if row["epoch"] else row["of"].replace("_", " ")
            tqdm.write(
                f"{of}: {100 * row['instance_recall_1']:.1f}% of {row['images']:,} images found by another view of "
                f"them, effective rank {row['effective_rank']:.1f}",
                file=sys.stderr,
            )
        elif row["kind"] == "train":
            self._advance(row)

    def _advance(self, row: dict[str, Any]) -> None:
        if self._bar is not None and row["step"] < self._bar.n:
            # The workers started again from an earlier step: so does the measuring of their pace.
            self._bar.leave = False
            self._bar.close()
            self._bar, self._next_line = None, 0.0
        if self._bar is None:
            # Without a terminal the bar only keeps the time; what it would show is printed as lines.
            sink = sys.stderr if sys.stderr.isatty() else io.StringIO()
            total, done = row["total_steps"], row["step"] - 1
            self._bar = tqdm(total=total, initial=done, unit="step", file=sink, dynamic_ncols=True)
        state = f"epoch {row['epoch']:.1f}, loss {row['loss']:.4g}"
        if row["images_per_second"]:
            state += f", {row['images_per_second']:,.0f} images/s"
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(row["step"] - self._bar.n)
        if not sys.stderr.isatty() and (
            time.monotonic() >= self._next_line or row["step"] == row["total_steps"]
        ):
            self._next_line = time.monotonic() + _LINE_SECONDS
            rate = self._bar.format_dict["rate"]
            left = f", {(row['total_steps'] - row['step']) / rate:.0f} s left" if rate else ""
            print(f"step {row['step']}/{row['total_steps']}, {state}{left}", file=sys.stderr, flush=True)


def _accuracy(row: dict[str, Any], name: str) -> str:
    """One figure of a measurement with what it rests on; earlier releases wrote top-1 alone."""
    top1, balanced, k = row[f"knn_top1_{name}"], row.get(f"balanced_{name}"), row.get(f"k_{name}")
    if top1 is None:
        return f"{name.replace('_', ' ')} –"
    more = "" if k is None or balanced is None else f" (k = {k}, balanced {100 * balanced:.1f}%)"
    return f"{name.replace('_', ' ')} {100 * top1:.1f}%{more}"
