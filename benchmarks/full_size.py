"""A run of the size that the papers have: 1,281,167 images in tars, trained, interrupted, resumed and evaluated.

    python benchmarks/full_size.py [--images 1281167] [--steps 300] [--objectives nce softmax] [--json FILE]

The images are the bundled sample's, as JPEGs of 32 pixels, over and over, in 128 tars with the numbers of their classes
beside them. For each objective ResNet-8 is trained by two workers under Ray until the steps are done, stopped by
SIGINT, resumed with four workers on half a CPU each for a tenth of the steps more, and 1,000 queries are classified by
two actors. Listing is part of the first start and of no other. Memory is what a process has for itself (RssAnon).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from instdisc.common.files import read_lines
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.reader import ImageReader

TARS, QUERIES, BATCH = 128, 1000, 256
RECIPES = {"nce": "cifar10-npid", "softmax": "cifar10-softmax", "infonce": "cifar10-infonce"}
OPTIONS = ["--backbone.name", "resnet8", "--training.epochs", "100", "--training.batch-size", str(BATCH)]
OPTIONS += ["--knn.every", "0", "--knn.no-baselines", "--optimizer.warmup-epochs", "0", "--metrics.port", "0"]


def jpegs() -> Iterator[tuple[bytes, str]]:
    """The bundled training images, encoded again, and their classes."""
    manifest = build_manifest(resolve("sample", root=Path(tempfile.gettempdir()), download=False))
    reader = ImageReader(manifest)
    for row in range(len(manifest)):
        buffer = io.BytesIO()
        reader.decode(row).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue(), str(manifest.labels[row])
    reader.close()


def make(folder: Path, count: int) -> None:
    """Write the tars, and one of queries."""
    pictures = list(jpegs())
    for name, numbers in [
        ("queries.tar", range(QUERIES)),
        *((f"train-{each:04}.tar", part) for each, part in enumerate(np.array_split(np.arange(count), TARS))),
    ]:
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                data, label = pictures[int(number) % len(pictures)]
                for ending, content in (("jpg", data), ("cls", label.encode())):
                    member = tarfile.TarInfo(f"{number:07}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@contextmanager
def program(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program of ours with a Ray of its own, killed at the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=output,
            env=os.environ | {"RAY_ADDRESS": "local"},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def trained_steps(run: Path) -> int:
    """The newest step in the metrics file."""
    path = run / "metrics.jsonl"
    rows = read_lines(path) if path.exists() else []
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def private_mb() -> dict[str, int]:
    """The most that a process of each kind has for itself."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            kind = re.match(r"ray::RayTrainWorker|ray::\w*Actor|.*-m instdisc\.\w+", name)
            anonymous = re.search(r"RssAnon:\s+(\d+)", (process / "status").read_text())
            if kind and anonymous:
                short = kind[0].rpartition(" ")[2]
                found[short] = max(found.get(short, 0), int(anonymous[1]) // 1024)
    return found


def until_step(process: subprocess.Popen[bytes], run: Path, step: int) -> dict[str, int]:
    """Wait for a step; the memory on the way."""
    most: dict[str, int] = {}
    while True:
        for name, size in private_mb().items():
            most[name] = max(most.get(name, 0), size)
        if trained_steps(run) >= step:
            return most
        if process.poll() is not None:
            raise SystemExit(f"training ended with {process.returncode}: see the log beside {run}")
        time.sleep(1)


def measure(objective: str, images: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One objective: train, stop, resume, evaluate."""
    run, log = folder / objective, folder / f"{objective}.log"
    train = ["instdisc.train", RECIPES[objective], "--data.path", str(images / "train-{0000..0127}.tar")]
    train += ["--data.test-path", "None", "--run-dir", str(run), *OPTIONS]
    begun = time.monotonic()
    with program(*train, "--num-workers", "2", log=log) as process:
        until_step(process, run, 1)
        first = time.monotonic() - begun
        memory = until_step(process, run, steps)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        process.wait()
        stopping = time.monotonic() - asked
    lines = [row for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]
    speed = float(np.median([row["images_per_second"] for row in lines[1:]]))
    stopped = trained_steps(run)
    begun = time.monotonic()
    with program(*train, "--num-workers", "4", "--cpus-per-worker", "0.5", log=log) as process:
        until_step(process, run, stopped + 1)
        resumed = time.monotonic() - begun
        memory_of_four = until_step(process, run, stopped + max(1, steps // 10))
        process.send_signal(signal.SIGINT)
        process.wait()
    begun = time.monotonic()
    evaluate = ["instdisc.evaluate", str(run), "--queries.path", str(images / "queries.tar")]
    with program(*evaluate, "--num-actors", "2", "--metrics.port", "0", log=log) as process:
        process.wait()
        if process.returncode:
            raise SystemExit(f"the evaluation ended with {process.returncode}: see {log}")
    evaluated = time.monotonic() - begun
    newest = max((run / "snapshots").glob("step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {
        "objective": objective,
        "first step after s": round(first, 1),
        "images/s, two workers": round(speed),
        "signal to exit s": round(stopping, 1),
        "snapshot MB": round(size / 1e6),
        "resumed, four workers, next step after s": round(resumed, 1),
        "evaluation of 1,000 queries s": round(evaluated, 1),
        "private MB, two workers": memory,
        "private MB, four workers": memory_of_four,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--objectives", nargs="+", choices=RECIPES, default=["nce", "softmax"])
    parser.add_argument("--keep", type=Path, help="where images and runs stay")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.keep is None else arguments.keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "queries.tar").exists():
            begun = time.monotonic()
            make(folder, arguments.images)
            print(f"{arguments.images:,} images written in {time.monotonic() - begun:.0f} s", flush=True)
        rows = []
        for objective in arguments.objectives:
            rows.append(measure(objective, folder, folder, arguments.steps))
            print("\n".join(f"{name}: {value}" for name, value in rows[-1].items()) + "\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
