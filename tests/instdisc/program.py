"""Pictures to train on, and what to look at after a run of the training program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from instdisc.runs.run_directory import RunDirectory

SMALL = [
    "--num-workers",
    "0",
    "--training.epochs",
    "2",
    "--training.batch-size",
    "8",
    "--backbone.embedding-dim",
    "16",
]
SMALL += ["--knn.k", "5", "--optimizer.warmup-epochs", "0", "--metrics.port", "0"]

Run = Callable[..., tuple[int, str, Path]]


def picture(number: int, size: int = 36) -> Image.Image:
    generator = np.random.default_rng(number)
    small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size))


def write_pictures(folder: Path, count: int, classes: int = 0) -> Path:
    for number in range(count):
        place = folder / f"class{number % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:03}.png")
    return folder


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def bank_of(run_dir: Path) -> NDArray[Any]:
    """The rows of the newest snapshot."""
    return RunDirectory(run_dir).open_snapshot().read("embeddings")


def snapshot_content(run: RunDirectory) -> dict[str, Any]:
    """All that the newest snapshot holds but the time it took and whose it is."""
    snapshot = run.open_snapshot()
    tables = {name: snapshot.read(name).tolist() for name in snapshot.tables}
    files = {name: snapshot.read_file(name) for name in snapshot.files}
    noted = {
        name: value for name, value in snapshot.attributes.items() if name not in ("train_seconds", "run_id")
    }
    return tables | files | noted


def measured(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of the metrics file without times, messages and what is compared with the measurement before."""
    timings = ("images_per_second", "loader_wait_fraction", "train_seconds", "neighbors_changed")
    rows = [json.loads(line) for line in run.journal.read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in timings}
        for row in rows
        if row["kind"] != "status"
    ]


def solid(folder: Path, classes: dict[str, tuple[int, int, int]], count: int) -> Path:
    """Images whose class is their color, up to a little noise."""
    for name, color in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
            Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def refused(result: tuple[int, str, Path], *texts: str) -> None:
    status, said, _ = result
    assert status == 2, said
    assert "Traceback" not in said
    for text in texts:
        assert text in said
