"""`train auto` beside the recipes at equal minutes: kNN accuracy on small images and on enlarged ones.

    python benchmarks/auto.py [--minutes 3] [--only small|enlarged] [--epochs N] [--json FILE]

Small images are the bundled sample, 5,000 of 32 pixels, beside the recipe `sample`. In place of labeled photographs,
500 of them are enlarged to 160 pixels and stored as JPEGs, beside `imagenet-resnet50-npid`. A recipe gets the epochs
that fit at the speed of a trial of a few steps; one, where already an epoch takes longer (`--epochs 1`). Trains in this
process; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from instdisc.settings.recipes import RECIPES
from instdisc.train import main as train
from instdisc.training.auto import images_per_second
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader

ENLARGED, SIDE = 500, 160


def enlarge(manifest: Manifest, count: int, folder: Path) -> None:
    """Random images, as JPEGs in class folders."""
    reader = ImageReader(manifest)
    for row in np.random.default_rng(0).permutation(len(manifest))[:count].tolist():
        place = folder / manifest.class_names[manifest.labels[row]]
        place.mkdir(parents=True, exist_ok=True)
        reader.decode(row).resize((SIDE, SIDE)).save(place / f"{row}.jpg", quality=90)
    reader.close()


def opened(path: str) -> Manifest:
    return build_manifest(resolve(path, root=Path("data"), download=False), show_progress=False)


def recipe_epochs(recipe: str, images: Manifest, minutes: float) -> int:
    speed = images_per_second(RECIPES[recipe].config, images)
    return max(1, round(0.85 * 60 * minutes * speed / len(images)))


def measured(arguments: list[str], directory: Path) -> dict[str, Any]:
    started = time.perf_counter()
    options = ["--num-workers", "0", "--metrics.port", "0", "--knn.every", "0"]
    assert train([*arguments, *options, "--run-dir", str(directory)]) == 0
    summary = json.loads((directory / "summary.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    return {
        "network": f"{config['backbone']['name']} at {config['augmentation']['image_size']}",
        "epochs": summary["epochs"],
        "seconds": round(time.perf_counter() - started),
        "pixels": summary["knn_top1_raw_pixels"],
        "kNN top-1": summary["knn_top1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", choices=("small", "enlarged"))
    parser.add_argument("--epochs", type=int, help="of the recipe, instead of a trial")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        cases = {"small": ("sample", "sample", "sample:test")}
        if arguments.only != "small":
            for name, source, count in (("train", "sample", ENLARGED), ("test", "sample:test", 1000)):
                enlarge(opened(source), count, folder / name)
            cases["enlarged"] = ("imagenet-resnet50-npid", str(folder / "train"), str(folder / "test"))
        for case, (recipe, images, test) in cases.items():
            if arguments.only not in (None, case):
                continue
            epochs = arguments.epochs or recipe_epochs(recipe, opened(images), arguments.minutes)
            where = ["--data.path", images, "--data.test-path", test]
            for command in (
                ["auto", "--minutes", str(arguments.minutes)],
                [recipe, "--training.epochs", str(epochs), "--knn.no-baselines"],
            ):
                found = measured([*command, *where], folder / f"{case}-{command[0]}")
                rows.append({"images": case, "command": command[0], **found})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
