"""What a step asks of a GPU and of the network between ranks, counted without a GPU.

    python -m benchmarks.step_counts [--json FILE]

For every objective and 1, 2 and 8 ranks: how often the host waits for the GPU between the first and the last launch of
a step, operations launched outside the network, collectives without those of DDP, and bytes that a rank sends. The GPU
is pretended, by helpers of the tests: tensors that compute on the CPU and count. 32 images, D = 16, 4,000 rows; waits,
launches and collectives depend on none of these, as long as the blocks of an objective are as many.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests import pretend_gpu
from tests.pretended_steps import OBJECTIVES, count_step

WORLD_SIZES = (1, 2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"a pretended GPU, torch {torch.__version__}")
    print(f"{'objective':<24}{'W':>3}{'waits':>7}{'launches':>10}{'collectives':>13}{'sent bytes':>12}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=pretend_gpu.begin) as pool:
        for name, (objective, options) in OBJECTIVES.items():
            for world_size in WORLD_SIZES:
                counts = pool.submit(count_step, objective, world_size, **options).result()
                row = {
                    "objective": name,
                    "world_size": world_size,
                    "waits": sum(counts.waits.values()),
                    "launches": counts.launches,
                    "collectives": counts.collectives,
                    "sent_bytes": counts.sent_bytes,
                }
                rows.append(row)
                print(
                    f"{name:<24}{world_size:>3}{row['waits']:>7}{counts.launches:>10}"
                    f"{sum(counts.collectives.values()):>13}{counts.sent_bytes:>12,}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
