"""What a GPU must show, in one command of at most nine minutes: is it right, does it wait, how fast is it.

    python -m benchmarks.gpu [PART …] [--data DIR] [--device cpu --small] [--json FILE]

Each part prints its rows, and ends by itself when its share of `--minutes` is spent:

    right       objectives, kernels, kNN and the loader against float64 and the CPU
    views       batches of two views under a busy stream, against those of the CPU
    waits       200 steps of every objective in which a wait for the GPU is an error
    objectives  every objective at n = 1,281,167 beside the formulation of public code
    steps       ResNet-50 at 224 pixels with the bank and without, images/s, shares of exchange and idle GPU
    images      the same from JPEGs: the share of waiting for the loader
    knn         50,000 queries against 1,281,167 rows, k = 200, beside torch's product and topk, and faiss where it is
    cifar10     ResNet-18, two views, as many epochs as fit: seconds and kNN accuracy of an epoch (needs --data)

It needs torch, torchvision, numpy, Pillow and pyarrow alone: neither Ray, DALI, Zarr nor a command-line library. So the
loader is that of Pillow; whether DALI's memory is reused too early stays unproven here, as does all that needs two
GPUs. `--data` names a folder of tar files, such as `benchmarks/cut.py` makes of CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_checks import Row, Setting, objectives, right, views, waits
from benchmarks.gpu_speed import cifar10, images, knn, steps

PARTS: dict[str, tuple[Callable[[Setting], Iterator[Row]], float]] = {
    "right": (right, 1.0),
    "views": (views, 0.5),
    "waits": (waits, 0.8),
    "objectives": (objectives, 1.5),
    "steps": (steps, 1.2),
    "images": (images, 0.7),
    "knn": (knn, 0.8),
    "cifar10": (cifar10, 2.5),
}
"""What is measured by each part, and its share of the time."""


def machine(device: torch.device) -> Row:
    """Device, driver and versions."""
    found: Row = {"torch": torch.__version__, "python": sys.version.split()[0], "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found


def shown(row: Row) -> str:
    """A row as a line of text."""
    return "  " + "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if value not in (None, "")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder with train and test, each of tar files or images")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a dry run: tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--json", type=Path, help="write all rows to this file, as they come")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; a dry run is --device cpu --small")
    device = torch.device(given.device)
    chosen = {name: PARTS[name] for name in given.parts or PARTS}
    per_share = 60 * given.minutes / sum(share for _, share in chosen.values())
    results: Row = {"machine": machine(device), "needs_two_gpus": "left out: NCCL between ranks"}
    print(shown(results["machine"]))
    failed = False
    for name, (part, share) in chosen.items():
        print(f"{name}", flush=True)
        start, rows = time.perf_counter(), results.setdefault(name, [])
        try:
            for row in part(Setting(device, given.small, given.data, share * per_share)):
                rows.append(row)
                print(shown(row), flush=True)
        except Exception as error:  # of any kind: the other parts are worth their time all the same
            rows.append({"error": f"{type(error).__name__}: {error}", "ok": False})
            print(shown(rows[-1]), flush=True)
        failed |= any(row.get("ok") is False for row in rows)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
