"""Snapshots of the bank: write speed beside plain Zarr, the stall of the steps, and SIGKILLs during a write.

    python benchmarks/snapshots.py [--json FILE] [--folder FOLDER]

Two processes of one thread each hold a bank of 1,281,167 rows of 128 float32 (655 MB). Speed: the bank alone, from
the call of `save` to the commit, synced to the disk; plain Zarr writes the same chunks from the same two processes,
with and without syncing them afterwards; all three in turn. Stall: steps of about 0.5 s of matrix products and an
all-reduce, with one snapshot (bank, labels and keys) in the interval, beside as many steps without, half of them
before and half after. Kills: both writers killed at a random moment of a write, then the store is opened and every
row compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import random
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zarr

from cluster.partition import Partition
from cluster.snapshot_writer import SnapshotWriter
from cluster.snapshots import open_snapshot
from cluster.storage import Storage

WORLD_SIZE = 2
DIM = 128
STEP_S = 0.5
REPEATS = 5
ROUND = "{:.3g}".format


def write_plain(path: Path, partition: Partition, rank: int, rows: torch.Tensor, barrier: Barrier) -> None:
    """Write with Zarr as anyone would: one array, every process its own chunks, no checksums."""
    if rank == 0:
        shape, chunks = (partition.num_rows, DIM), (partition.block, DIM)
        zarr.create_array(str(path), shape=shape, chunks=chunks, dtype="float32", compressors=None)
    barrier.wait()
    zarr.open_array(str(path), mode="r+")[partition.start(rank) : partition.stop(rank)] = rows.numpy()


def measure_writes(rank: int, folder: Path, partition: Partition, barrier: Barrier, results: Any) -> None:
    """Seconds until both processes are done, for each way to write in turn."""
    torch.set_num_threads(1)
    rows = torch.randn(partition.stop(rank) - partition.start(rank), DIM)
    writer = SnapshotWriter(folder / "snapshots", partition, rank, "speed", keep=1)
    writer.save(0, {"embeddings": rows})  # its buffer is allocated once per run
    writer.wait()
    seconds: dict[str, list[float]] = {"plain": [], "plain, synced": [], "snapshot": []}
    for repeat in range(1, REPEATS + 1):
        path = folder / f"plain{repeat}"
        barrier.wait()
        start = time.perf_counter()
        write_plain(path, partition, rank, rows, barrier)
        barrier.wait()
        seconds["plain"].append(time.perf_counter() - start)
        if rank == 0:
            Storage.at(path).sync(Storage.at(path).sizes())
        barrier.wait()
        seconds["plain, synced"].append(time.perf_counter() - start)
        barrier.wait()
        start = time.perf_counter()
        writer.save(repeat, {"embeddings": rows})
        writer.wait()
        barrier.wait()
        seconds["snapshot"].append(time.perf_counter() - start)
        if rank == 0:
            Storage.at(folder).remove(path.name)
    writer.close()
    errors = [report.error for report in writer.poll() if report.error]
    assert not errors, errors
    if rank == 0:
        results.put({name: statistics.median(values) for name, values in seconds.items()})


def measure_stall(rank: int, folder: Path, partition: Partition, num_steps: int, results: Any) -> None:
    """Seconds of the steps with and without a snapshot."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=600), WORLD_SIZE, rank)
    matrix, gradient = torch.randn(1024, 1024) / 32, torch.zeros(1 << 18)

    def step(products: int) -> None:
        hidden = matrix
        for _ in range(products):
            hidden = torch.relu(hidden @ matrix)
        dist.all_reduce(gradient)

    trial = 100
    start = time.perf_counter()
    step(trial)
    products = torch.tensor(trial * STEP_S / (time.perf_counter() - start))
    dist.all_reduce(products, dist.ReduceOp.MIN)

    start_row, stop_row = partition.start(rank), partition.stop(rank)
    tables = {
        "embeddings": torch.randn(stop_row - start_row, DIM),
        "labels": torch.zeros(stop_row - start_row, dtype=torch.int32),
        "keys": [f"n{row % 1000:08d}/n{row % 1000:08d}_{row}" for row in range(start_row, stop_row)],
    }
    writer = SnapshotWriter(folder / "snapshots", partition, rank, "stall", keep=1)
    writer.save(0, tables)
    writer.wait()

    def interval(steps: int, snapshot: int | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        for number in range(steps):
            if number == steps // 4 and snapshot is not None:
                writer.save(snapshot, tables)
            step(int(products))
        return time.perf_counter() - start

    without = interval(num_steps // 2, None)
    with_snapshot = interval(num_steps, 1)
    without += interval(num_steps - num_steps // 2, None)
    writer.close()
    reports = writer.poll()
    assert not any(report.error for report in reports), reports
    dist.destroy_process_group()
    if rank == 0:
        results.put({"with": with_snapshot, "without": without, "write": reports[-1].seconds})


def write_step(
    rank: int, folder: Path, partition: Partition, step: int, barrier: Barrier, announced: Any
) -> None:
    """Save a bank that is full of `step`; tell when the write begins and when it has ended."""
    writer = SnapshotWriter(folder / "snapshots", partition, rank, f"start{step}", keep=1)
    rows = torch.full((partition.stop(rank) - partition.start(rank), DIM), float(step))
    barrier.wait()
    writer.save(step, {"embeddings": rows})
    announced.put("begun")
    writer.close()
    announced.put("ended")


def measure_kills(folder: Path, partition: Partition, kills: int) -> dict[str, int]:
    """How many of `kills` stores were whole, and how many kills came before the commit."""
    context = mp.get_context("fork")  # a new interpreter per kill would take most of the time

    def start(step: int) -> tuple[list[Any], Any]:
        announced, barrier = context.Queue(), context.Barrier(WORLD_SIZE)
        arguments = [(rank, folder, partition, step, barrier, announced) for rank in range(WORLD_SIZE)]
        processes = [context.Process(target=write_step, args=argument) for argument in arguments]
        for process in processes:
            process.start()
        for _ in processes:
            announced.get()
        return processes, time.perf_counter()

    processes, begun = start(0)
    for process in processes:
        process.join()
    duration = time.perf_counter() - begun
    moments, whole, interrupted = random.Random(0), 0, 0
    for step in range(1, kills + 1):
        previous = open_snapshot(folder / "snapshots").step
        processes, _ = start(step)
        time.sleep(moments.uniform(0, duration))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        snapshot = open_snapshot(folder / "snapshots")
        interrupted += snapshot.step == previous
        same = all(
            (
                snapshot.read("embeddings", first, min(first + 100_000, partition.num_rows)) == snapshot.step
            ).all()
            for first in range(0, partition.num_rows, 100_000)
        )
        whole += snapshot.step in (previous, step) and not snapshot.verify() and bool(same)
    return {"kills": kills, "whole": whole, "interrupted": interrupted}


def run(function: Any, *arguments: Any) -> Any:
    """Return what rank 0 of two new processes puts in the queue it gets last."""
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=function, args=(rank, *arguments, results)) for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--steps", type=int, default=200, help="steps in an interval with one snapshot")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    partition = Partition(arguments.rows, WORLD_SIZE)
    megabytes = arguments.rows * DIM * 4 / 1e6
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folders = [Path(temporary) / name for name in ("kills", "writes", "stall")]
        for folder in folders:
            folder.mkdir()
        killed = measure_kills(folders[0], partition, arguments.kills)  # first: it forks
        barrier = mp.get_context("spawn").Barrier(WORLD_SIZE)
        writes = run(measure_writes, folders[1], partition, barrier)
        stall = run(measure_stall, folders[2], partition, arguments.steps)
    rows: list[dict[str, str | float]] = [
        {"what": f"write {megabytes:.0f} MB: {name}, MB/s", "value": megabytes / seconds}
        for name, seconds in writes.items()
    ]
    rows += [
        {"what": "snapshot beside plain", "value": writes["plain"] / writes["snapshot"]},
        {"what": "snapshot beside plain, synced", "value": writes["plain, synced"] / writes["snapshot"]},
        {"what": f"{arguments.steps} steps without a snapshot, s", "value": stall["without"]},
        {"what": f"{arguments.steps} steps with one, s", "value": stall["with"]},
        {"what": "stall, %", "value": 100 * (stall["with"] / stall["without"] - 1)},
        {"what": "seconds of that snapshot", "value": stall["write"]},
    ]
    rows += [
        {"what": f"SIGKILLs: {name}", "value": killed[name]} for name in ("kills", "interrupted", "whole")
    ]
    print("| | |\n|---|---|")
    for row in rows:
        print(f"| {row['what']} | {ROUND(row['value'])} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
