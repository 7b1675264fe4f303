"""Images per second of the two loaders, side by side.

    python benchmarks/loader.py [--photos TAR_OR_FOLDER] [--json FILE]

The bundled sample is loaded at 32 pixels, the data set of `--photos` (JPEGs of usual sizes) at 224: one view as in
evaluation, one and two views as in training. The loaders take turns and the best turn of each counts, as other work
on the machine only ever slows one down. An image with two views counts once. Beside images per second stand images
per second of processor time: what to expect of a core, whatever else the machine is doing.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.settings import LoaderConfig

CASES = {"evaluation": (False, 1), "training, 1 view": (True, 1), "training, 2 views": (True, 2)}
BACKENDS = ("dali", "host")
WARM_UP = 2  # batches


def speed(
    manifest: Manifest, size: int, batch: int, case: tuple[bool, int], config: LoaderConfig, seconds: float
) -> tuple[float, float]:
    """Images per second, and per second of processor time, of a loader that is already running."""
    training, views = case
    loader = open_loader(
        manifest,
        Order(num_instances=len(manifest), global_batch=batch, seed=0).requests(),
        augmentation=Augmentation(image_size=size),
        training=training,
        views=views,
        seed=0,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        config=config,
    )
    with loader:
        for _ in range(WARM_UP + config.prefetch):
            next(loader)
        start, start_cpu = time.perf_counter(), time.process_time()
        for batches in itertools.count(1):
            next(loader)
            elapsed = time.perf_counter() - start
            if elapsed > seconds:
                images = batches * batch
                return images / elapsed, images / (time.process_time() - start_cpu)
    raise AssertionError("the requests are endless")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="images to be loaded at 224 pixels")
    parser.add_argument("--threads", type=int, default=None, help="threads per loader (default: all cores)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        data = [
            ("sample, 32 x 32", build_manifest(resolve("sample", root=root), show_progress=False), 32, 256)
        ]
        if arguments.photos:
            photos = build_manifest(arguments.photos, labels="none", show_progress=False)
            data.append(("photos at 224", photos, 224, min(64, len(photos))))
        for (name, manifest, size, batch), (case, options) in itertools.product(data, CASES.items()):
            best = dict.fromkeys(BACKENDS, (0.0, 0.0))
            for _, backend in itertools.product(range(arguments.turns), BACKENDS):
                config = LoaderConfig(backend=backend, threads=arguments.threads)
                got = speed(manifest, size, batch, options, config, arguments.seconds)
                best[backend] = max(best[backend][0], got[0]), max(best[backend][1], got[1])
            row: dict[str, str | int] = {"data": name, "case": case}
            for backend, (per_second, per_core_second) in best.items():
                row |= {f"{backend}/s": round(per_second), f"{backend}/core-s": round(per_core_second)}
            rows.append(row)
            if len(rows) == 1:
                print("".join(f"{key:>18}" for key in row))
            print("".join(f"{value:>18}" for value in row.values()))
    if arguments.json:
        cores = {"cores": os.cpu_count()}
        arguments.json.write_text(json.dumps([row | cores for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
