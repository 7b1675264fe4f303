"""Training that is interrupted again and again ends with the same bits as training that is not.

    python -m benchmarks.resume [--kills 20] [--json FILE]

Trains the recipe `sample` with two workers under Ray for a few epochs, once undisturbed, once while a random worker is
killed at random steps, and compares weights, bank, optimizer and everything measured. The seconds are those from a kill
to the first step logged after it: noticing, new processes, reading the snapshot, the loader's start, the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from instdisc.runs.run_directory import RunDirectory
from tests.instdisc.program import measured, snapshot_content
from tests.ray_cluster import CHECKOUT, processes_of_this_block, wait_until

OPTIONS = ["--training.log-every", "1", "--snapshots.every-steps", "5", "--snapshots.keep", "2"]
OPTIONS += ["--knn.every", "0", "--metrics.port", "0"]
STEPS_PER_EPOCH = 39


def command(run: RunDirectory, epochs: int, kills: int) -> list[str]:
    where = ["--run-dir", str(run.path), "--data.root", str(run.path.parent / "data")]
    how = ["--training.epochs", str(epochs), "--max-restarts", str(kills)]
    return [sys.executable, "-m", "instdisc.train", "sample", *where, *how, *OPTIONS]


def last_step(run: RunDirectory) -> int:
    """The last step logged; 0 before the first one."""
    try:
        rows = [json.loads(line) for line in run.journal.read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or a line that is being written
        return 0
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def resumed_at(run: RunDirectory) -> list[str]:
    """The messages of workers that went on from a snapshot."""
    rows = [json.loads(line) for line in run.journal.read_text().splitlines()]
    return [row["message"] for row in rows if row["kind"] == "status" and "resuming from" in row["message"]]


def train_with_kills(run: RunDirectory, epochs: int, steps: list[int]) -> list[float]:
    """Train, kill a random worker once each of the steps is reached; seconds until training went on."""
    environment: dict[str, str] = {"RAY_ADDRESS": "local"}
    seconds = []
    with processes_of_this_block(environment) as alive:
        program = subprocess.Popen(
            command(run, epochs, len(steps)), cwd=CHECKOUT, env=os.environ | environment
        )
        for step in steps:
            wait_until(lambda step=step: last_step(run) >= step, timeout_s=300)
            workers = [
                pid
                for pid in alive()
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
            ]
            resumed, start = len(resumed_at(run)), time.monotonic()
            os.kill(random.choice(workers), signal.SIGKILL)
            wait_until(lambda resumed=resumed: len(resumed_at(run)) > resumed, timeout_s=300)
            reached = last_step(run)
            wait_until(lambda reached=reached: last_step(run) > reached, timeout_s=300)
            seconds.append(time.monotonic() - start)
            print(f"killed at step {step}: {seconds[-1]:.1f} s", flush=True)
        if program.wait():
            raise RuntimeError(f"training ended with exit status {program.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    steps = sorted(random.sample(range(2, arguments.epochs * STEPS_PER_EPOCH - 10), arguments.kills))
    with tempfile.TemporaryDirectory() as directory:
        whole, killed = (RunDirectory(Path(directory) / name) for name in ("whole", "killed"))
        subprocess.run(
            command(whole, arguments.epochs, 0),
            cwd=CHECKOUT,
            env=os.environ | {"RAY_ADDRESS": "local"},
            check=True,
        )
        seconds = train_with_kills(killed, arguments.epochs, steps)
        one, other = snapshot_content(whole), snapshot_content(killed)
        differing = [name for name in one if one[name] != other.get(name)]
        if measured(whole) != measured(killed):
            differing.append("what was measured")
    result: dict[str, Any] = {
        "kills": arguments.kills,
        "steps": steps,
        "differing": differing,
        "median_seconds": statistics.median(seconds),
        "worst_seconds": max(seconds),
    }
    print(
        f"{arguments.kills} kills; differing: {', '.join(differing) or 'nothing'}; training again after "
        f"{result['median_seconds']:.1f} s (median), {result['worst_seconds']:.1f} s (worst)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
