"""Snapshots whose content follows from the step, written by any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotReport, SnapshotWriter
from cluster.snapshots import Snapshot

DIM = 6


def table_rows(step: int, num_rows: int) -> dict[str, Tensor | list[str]]:
    """All rows of the tables of a step."""
    numbers = torch.arange(num_rows)
    embeddings = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(step))
    return {
        "embeddings": embeddings,
        "half": embeddings.bfloat16(),
        "labels": (numbers * 0).int(),  # zeros, which a store that leaves out empty chunks would not write
        "keys": [f"n{number}/é{'x' * (number % 7)}" for number in range(num_rows)],
    }


def writers(
    url: str | Path, num_rows: int, world_size: int, attempt: str, keep: int = 2
) -> list[SnapshotWriter]:
    """One writer per rank."""
    partition = Partition(num_rows, world_size)
    return [SnapshotWriter(url, partition, rank, attempt, keep=keep) for rank in range(world_size)]


def save(ranks: list[SnapshotWriter], step: int, num_rows: int) -> None:
    """Start a save on every rank."""
    partition = Partition(num_rows, len(ranks))
    tables = table_rows(step, num_rows)
    for rank, writer in enumerate(ranks):
        mine = slice(partition.start(rank), partition.stop(rank))
        own = {name: rows[mine] for name, rows in tables.items()}
        writer.save(step, own, {f"rank-{rank}.bin": f"{step}/{rank}".encode()}, {"step": step})


def write(
    url: str | Path,
    step: int,
    num_rows: int = 1_000,
    world_size: int = 1,
    attempt: str = "first",
    keep: int = 2,
) -> list[SnapshotReport]:
    """Take one snapshot; return the report of every rank."""
    ranks = writers(url, num_rows, world_size, attempt, keep)
    save(ranks, step, num_rows)
    for writer in ranks:
        writer.close()
    return [report for writer in ranks for report in writer.poll()]


def assert_holds(snapshot: Snapshot, num_rows: int) -> None:
    """The snapshot is whole, and every table is that of its step."""
    assert snapshot.verify() == []
    assert snapshot.attributes["step"] == snapshot.step
    for name, rows in table_rows(snapshot.step, num_rows).items():
        expected = rows.float().numpy() if isinstance(rows, Tensor) else np.array(rows, dtype=object)
        np.testing.assert_array_equal(snapshot.read(name), expected)


def write_until_killed(url: str, num_rows: int, world_size: int, first_step: int, attempt: str) -> None:
    """Take one snapshot after another, and say so when each begins."""
    ranks = writers(url, num_rows, world_size, attempt)
    step = first_step
    while True:
        print(step, flush=True)
        save(ranks, step, num_rows)
        step += 1


if __name__ == "__main__":
    write_until_killed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
