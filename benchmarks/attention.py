"""Ways to compute the softmax over all rows of the bank, taking turns: what `objectives/attention.py` chooses from.

    python benchmarks/attention.py [--instances N] [--dim D] [--batch B] [--turns T] [--json FILE]

Medians of milliseconds. The error is that of the mean row, relative to its largest number, against blocks of two
products in float32 on the same rows. On a machine with a GPU it is used.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from instdisc.model.bank import random_unit_rows
from instdisc.objectives.attention import (
    AttentionKernel,
    attend_in_blocks,
    attend_in_parts,
    choose_kernel,
    fused_cpu_kernel,
)

TEMPERATURE = 0.07
BLOCK_ROWS = 4096
Way = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def all_logits(queries: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As public code does it: every score of the batch at once."""
    scores = (queries @ rows.T).float() / temperature
    return (torch.softmax(scores, dim=1).to(rows.dtype) @ rows).float(), torch.logsumexp(scores, dim=1)


def transposed_blocks(queries: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Blocks of two products with the scores laid out rows x queries."""
    count, dim = queries.shape
    highest = queries.new_full((count,), -torch.inf, dtype=torch.float32)
    mass, attended = torch.zeros_like(highest), queries.new_zeros(dim, count, dtype=torch.float32)
    columns, buffer = queries.T.contiguous(), queries.new_empty(BLOCK_ROWS, count)
    for first in range(0, len(rows), BLOCK_ROWS):
        block = rows[first : first + BLOCK_ROWS]
        scores = torch.mm(block, columns, out=buffer[: len(block)])
        higher = torch.maximum(highest, scores.amax(dim=0))
        weights = (scores - higher).div_(temperature).exp_()
        rescale = torch.exp((highest - higher) / temperature)
        mass = mass * rescale + weights.sum(dim=0)
        attended.mul_(rescale).add_(block.T @ weights.to(rows.dtype))
        highest = higher
    return (attended / mass).T, highest / temperature + torch.log(mass)


def one_call(
    kernel: AttentionKernel, queries: Tensor, rows: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The fused kernel on all rows at once."""
    output, log_sums = kernel(queries[None, None], rows[None, None], 1 / temperature)
    return output[0, 0].float(), log_sums[0, 0, : len(queries)]


def measure(queries: Tensor, rows: Tensor, turns: int) -> list[dict[str, object]]:
    """The table's rows for one dtype."""
    ways: dict[str, Way] = {
        "all logits": all_logits,
        "blocks": attend_in_blocks,
        "blocks, rows x queries": transposed_blocks,
    }
    chosen = choose_kernel(queries, rows)
    kernel = chosen or (fused_cpu_kernel() if rows.device.type == "cpu" else None)
    if kernel:
        ways["fused, one call"] = functools.partial(one_call, kernel)
        ways["fused, rows in parts"] = functools.partial(attend_in_parts, kernel)
    expected, _ = attend_in_blocks(queries.float(), rows.float(), TEMPERATURE)
    errors, times = {}, {name: list[float]() for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            synchronize(rows.device)
            start = time.perf_counter()
            mean, _ = way(queries, rows, TEMPERATURE)
            synchronize(rows.device)
            if turn:
                times[name].append(time.perf_counter() - start)
            else:  # the warm-up
                errors[name] = float((mean - expected).abs().max() / expected.abs().max())
    return [
        {
            "dtype": str(rows.dtype).removeprefix("torch."),
            "way": name,
            "ms": round(1e3 * statistics.median(times[name]), 2),
            "error": float(f"{errors[name]:.1e}"),
            "chosen": name == ("fused, rows in parts" if chosen else "blocks"),
        }
        for name in ways
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="float16 takes minutes on most CPUs"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries = random_unit_rows(0, arguments.batch, arguments.dim, seed=1).to(device)
    bank = random_unit_rows(0, arguments.instances, arguments.dim, seed=0).to(device)
    print(
        f"n = {arguments.instances:,}, D = {arguments.dim}, batch {arguments.batch}, {device}, "
        f"torch {torch.__version__}"
    )
    rows = []
    print("| dtype | way | ms | error | chosen |\n|---|---|---|---|---|")
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        for row in measure(queries.to(dtype), bank.to(dtype), arguments.turns):
            print(
                "| {dtype} | {way} | {ms} | {error} | {mark} |".format(**row, mark="x" * bool(row["chosen"]))
            )
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
