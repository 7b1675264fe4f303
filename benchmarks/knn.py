"""Exact sharded top-k beside one faiss search over the whole matrix, alternating in one run.

    python benchmarks/knn.py [--cases small,large] [--actors 0,1,2,4] [--json FILE]

k = 200 of unit rows with 128 entries, read from a snapshot: 10,000 queries in 50,000 rows, and 1,000 in 1,281,167. The
actors share the cores that faiss has to itself (0: no actors, the search in this process); starting them is reported
apart. The best of the repeats counts, as other work on the machine only ever slows one down. Memory is the peak of the
largest actor, with what it shares with others (libraries, queries in Ray's store).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from cluster.actors import available_threads, connect
from cluster.partition import Partition
from cluster.settings import ActorsConfig
from cluster.snapshot_writer import SnapshotWriter
from cluster.snapshots import Snapshot, open_snapshot
from cluster.tables import TableRows
from cluster.topk import TopK

DIM, K, REPEATS = 128, 200, 5
CASES = {"tiny": (300, 20_000), "small": (10_000, 50_000), "large": (1_000, 1_281_167)}
_PEER = "faiss.IndexFlatIP.search"


@dataclass(frozen=True)
class Row:
    """One line of the table; megabytes are 10⁶ bytes."""

    queries: int
    rows: int
    actors: int
    start_seconds: float
    seconds: float
    peer: str
    peer_seconds: float
    speedup: float
    shard_megabytes: float
    actor_megabytes: float | None
    ids_identical: bool


class NotedRows(TableRows):
    """Rows of a snapshot; notes who reads them in a folder."""

    def __init__(self, snapshot: Snapshot, notes: Path) -> None:
        super().__init__(snapshot, "embeddings")
        self._notes = notes

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1."""
        (self._notes / f"{os.getpid()}.pid").touch()
        return super().read(start, stop)


def write_snapshot(folder: Path, rows: npt.NDArray[np.float32]) -> Snapshot:
    writer = SnapshotWriter(folder / "snapshots", Partition(len(rows), 1), 0, "benchmark")
    writer.save(1, {"embeddings": rows})
    writer.close()
    return open_snapshot(folder / "snapshots")


def unit_rows(count: int, seed: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def peak_megabytes(folder: Path) -> float | None:
    """Of the largest process that read the rows; None for this process, which holds the peer's too."""
    peaks = []
    for note in folder.glob("*.pid"):
        if note.stem != str(os.getpid()):
            status = Path("/proc", note.stem, "status").read_text()
            peaks.append(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
    return max(peaks, default=None)


def agree(ours: tuple[Any, Any], peers: tuple[Any, Any]) -> bool:
    """Whether the ids are the same wherever the scores around them differ by more than 1e-6."""
    scores, ids = peers
    apart = np.abs(np.diff(scores, axis=1)) > 1e-6
    edge = np.ones((len(scores), 1), dtype=bool)
    clear = np.concatenate([edge, apart], axis=1) & np.concatenate([apart, ~edge], axis=1)
    return bool((ours[1] == ids)[clear].all() and np.allclose(ours[0], scores, rtol=0, atol=1e-6))


def measure(folder: Path, num_queries: int, num_rows: int, actors: list[int]) -> list[Row]:
    rows, queries = unit_rows(num_rows, seed=1), unit_rows(num_queries, seed=2)
    source = NotedRows(write_snapshot(folder, rows), folder)
    index = faiss.IndexFlatIP(DIM)
    index.add(rows)
    del rows
    table = []
    for number in actors:
        for note in folder.glob("*.pid"):
            note.unlink()
        cpus = available_threads() / max(number, 1)
        config = ActorsConfig(num_actors=number, cpus_per_actor=cpus if cpus < 1 else math.floor(cpus))
        start_seconds, top_k = timed(lambda config=config: TopK(source, config))
        with top_k:
            best, peer_best = math.inf, math.inf
            for _ in range(REPEATS):
                seconds, ours = timed(lambda top_k=top_k: top_k.search(queries, K))
                peer_seconds, peers = timed(lambda: index.search(queries, K))
                best, peer_best = min(best, seconds), min(peer_best, peer_seconds)
            megabytes = peak_megabytes(folder)
        shard = -(-num_rows // max(number, 1)) * DIM * 4 / 1e6
        table.append(
            Row(
                *(
                    num_queries,
                    num_rows,
                    number,
                    round(start_seconds, 2),
                    round(best, 3),
                    _PEER,
                    round(peer_best, 3),
                ),
                *(
                    round(peer_best / best, 2),
                    round(shard),
                    megabytes and round(megabytes),
                    agree(ours, peers),
                ),
            )
        )
        print(
            "".join(
                f"{value!s:>26}" if value == _PEER else f"{value!s:>17}" for value in vars(table[-1]).values()
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="small,large", help=f"of {', '.join(CASES)}")
    parser.add_argument("--actors", default="0,1,2,4", help="numbers of actors")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Row)]
    print("".join(f"{name:>26}" if name == "peer" else f"{name:>17}" for name in names))
    table = []
    with connect(ActorsConfig(num_actors=1)):
        for case in arguments.cases.split(","):
            with tempfile.TemporaryDirectory() as folder:
                table += measure(
                    Path(folder), *CASES[case], [int(number) for number in arguments.actors.split(",")]
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1) + "\n")


if __name__ == "__main__":
    main()
