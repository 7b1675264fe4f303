"""Time and memory of the objectives beside the formulation that public code uses, alternating in one run.

    python benchmarks/objectives.py [--json FILE]

One step's forward and gradient with a bank of 1,281,167 rows of 128 and a batch of 256, as in ImageNet training. For
several ranks, the bytes that each of them sends per step are counted in real process groups. On a machine with a GPU
it is used.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from cluster.partition import Partition
from instdisc.bank import Bank, random_unit_rows
from instdisc.objectives import NCE, OBJECTIVES, NCEConfig, ObjectiveConfig, SoftmaxConfig

REPEATS = 9
WORLD_SIZES = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    objective: str
    dtype: str
    world_size: int
    seconds: float
    peer: str
    peer_seconds: float
    speedup: float
    extra_megabytes: float
    peer_extra_megabytes: float
    sent_bytes: int
    sent_bytes_limit: int


def gather_then_bmm(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    bank: Tensor,
    config: NCEConfig,
    log_partition: float,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient as public code computes them: all sampled rows gathered at once, then autograd."""
    queries = queries.detach().requires_grad_()
    rows = bank[torch.cat([positives[:, None], negatives], dim=1)]
    scores = torch.bmm(rows, queries[:, :, None])[..., 0].float() / config.temperature
    logits = scores - log_partition + math.log(len(bank) / config.num_negatives)
    loss = F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(dim=1)
    (gradient,) = torch.autograd.grad(loss.sum(), queries)
    return loss.detach(), gradient


def materialised_softmax(
    queries: Tensor, positives: Tensor, bank: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient as public code computes them: all logits of the batch at once, then autograd."""
    queries = queries.detach().requires_grad_()
    logits = (queries @ bank.T).float() / temperature
    loss = F.cross_entropy(logits, positives, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), queries)
    return loss.detach(), gradient


def measure(
    config: ObjectiveConfig,
    peer_name: str,
    dtype: torch.dtype,
    peer_dtype: torch.dtype,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> Row:
    """Time and memory of one objective beside a peer on the same numbers."""
    num_instances, dim, batch = sizes
    objective = OBJECTIVES[type(config)](config, num_instances, dim)
    exact = random_unit_rows(0, num_instances, dim, seed=0).to(device)
    bank, peer_bank = Bank(exact.to(dtype)), Bank(exact.to(peer_dtype))
    queries = F.normalize(torch.randn(batch, dim, generator=torch.Generator().manual_seed(1)), dim=1).to(
        device
    )
    ids = torch.randperm(num_instances, generator=torch.Generator().manual_seed(2))[:batch].to(device)
    generator = torch.Generator(device)
    noise = NCE(config if isinstance(config, NCEConfig) else NCEConfig(), num_instances, dim)

    def ours() -> tuple[Tensor, Tensor]:
        terms = objective.shard_terms(queries.to(dtype), ids, bank, generator.manual_seed(3), torch.clone)
        result = objective.merge(terms[None], ids)
        return result.loss_B, result.gradient_BD

    def gathered() -> tuple[Tensor, Tensor]:
        negatives, _ = noise.draw(batch, peer_bank, generator.manual_seed(3))
        sample = (queries.to(peer_dtype), ids, negatives, peer_bank.rows)
        return gather_then_bmm(*sample, noise.config, noise.log_partition)

    def materialised() -> tuple[Tensor, Tensor]:
        return materialised_softmax(queries.to(peer_dtype), ids, peer_bank.rows, config.temperature)

    peer = {"gather then bmm": gathered, "all logits": materialised}[peer_name]
    if isinstance(config, NCEConfig) == (peer is gathered):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        for mine, theirs in zip(ours(), peer(), strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs.float(), rtol=tolerance, atol=tolerance * scale)
    seconds, peer_seconds = alternate(ours, peer, device)
    return Row(
        objective="nce" if isinstance(config, NCEConfig) else "softmax",
        dtype=str(dtype).removeprefix("torch."),
        world_size=1,
        seconds=seconds,
        peer=f"{peer_name}, {str(peer_dtype).removeprefix('torch.')}",
        peer_seconds=peer_seconds,
        speedup=peer_seconds / seconds,
        extra_megabytes=extra_megabytes(ours, device),
        peer_extra_megabytes=extra_megabytes(peer, device),
        sent_bytes=0,
        sent_bytes_limit=0,
    )


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Median seconds of both, measured in turns after a warm-up."""
    times: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for repeat in range(REPEATS + 1):
        for function, seconds in times.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[ours]), statistics.median(times[peer])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_megabytes(function: Callable[[], object], device: torch.device) -> float:
    """The most memory (10^6 bytes) in use during a call, above what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    # Memory that the allocator kept from earlier calls would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    before, most, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        function()
    done.set()
    watcher.join()
    return max(0, most - before) / 1e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def count_bytes(
    rank: int, world_size: int, batch: int, dim: int, directory: str, cases: list[tuple[int, int]]
) -> None:
    """Bytes a rank sends in one step, for several numbers of instances and negatives."""
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    sent = []
    for num_instances, num_negatives in cases:
        exchange, partition = Exchange(rank, world_size), Partition(num_instances, world_size)
        start, stop = partition.start(rank), partition.stop(rank)
        bank = Bank(random_unit_rows(start, stop, dim, seed=0), start)
        objective = NCE(NCEConfig(num_negatives=num_negatives), num_instances, dim)
        local = batch // world_size
        embeddings = F.normalize(torch.randn(local, dim), dim=1)
        ids = torch.randperm(num_instances, generator=torch.Generator().manual_seed(5))[:batch][
            rank * local :
        ][:local]
        queries, all_ids = exchange.gather(embeddings, ids)
        terms = objective.shard_terms(
            queries, all_ids, bank, torch.Generator().manual_seed(rank), exchange.log_sum_exp
        )
        result = objective.merge(exchange.to_askers(terms), ids)
        exchange.sum(torch.zeros(len(result.sums) + 1 + world_size, dtype=torch.float64))
        bank.update(*exchange.route(embeddings, all_ids, partition), momentum=0.5)
        sent.append(exchange.sent_bytes)
    dist.destroy_process_group()
    (Path(directory) / str(rank)).write_text(json.dumps(sent))


def measure_bytes(world_size: int, batch: int, dim: int) -> list[Row]:
    cases = [(20_000, 512), (20_000, 4096), (100_000, 4096)]
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(count_bytes, (world_size, batch, dim, directory, cases), nprocs=world_size)
        sent = [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(world_size)]
    limit = 2 * batch * (dim + 4) * 4
    rows = []
    for case, (num_instances, num_negatives) in enumerate(cases):
        most = max(rank[case] for rank in sent)
        name = f"nce bytes, n={num_instances} m={num_negatives}"
        rows.append(
            Row(
                name, "float32", world_size, math.nan, "", math.nan, math.nan, math.nan, math.nan, most, limit
            )
        )
    return rows


def print_table(rows: list[Row]) -> None:
    print(
        f"{'objective':<28}{'dtype':<10}{'W':>2}{'ms':>9}  {'peer':<26}{'peer ms':>9}{'speedup':>9}", end=""
    )
    print(f"{'extra MB':>10}{'peer MB':>9}{'sent bytes':>12}{'limit':>9}")
    for row in rows:
        timed = f"{1e3 * row.seconds:>9.1f}  {row.peer:<26}{1e3 * row.peer_seconds:>9.1f}{row.speedup:>9.2f}"
        memory = f"{row.extra_megabytes:>10.1f}{row.peer_extra_megabytes:>9.1f}"
        sent = f"{row.sent_bytes:>12,}{row.sent_bytes_limit:>9,}"
        print(
            f"{row.objective:<28}{row.dtype:<10}{row.world_size:>2}{timed}{memory}{sent}".replace(
                "nan", "  -"
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (arguments.instances, arguments.dim, arguments.batch)
    full, half = torch.float32, torch.bfloat16
    rows = [
        measure(NCEConfig(), "gather then bmm", full, full, sizes, device),
        measure(NCEConfig(), "gather then bmm", half, half, sizes, device),
        measure(SoftmaxConfig(), "all logits", full, full, sizes, device),
        measure(SoftmaxConfig(), "gather then bmm", half, full, sizes, device),
    ]
    for world_size in WORLD_SIZES:
        rows += measure_bytes(world_size, arguments.batch, arguments.dim)
    print(
        f"n = {arguments.instances:,}, D = {arguments.dim}, batch {arguments.batch}, {device}, "
        f"torch {torch.__version__}"
    )
    print_table(rows)
    if arguments.json:
        values = [dataclasses.asdict(row) for row in rows]
        # Not a number stands for not measured, which JSON writes as null.
        measured = [
            {name: None if value != value else value for name, value in row.items()} for row in values
        ]
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
