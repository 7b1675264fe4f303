"""What it is worth to begin from a network that was trained on other images: kNN accuracy at equal seconds.

    python benchmarks/init.py --cifar TAR [--seeds 0 1 2] [--json FILE]

The starting network is trained without labels on the training images of five classes of CIFAR-10. Few images of the
other five classes are then embedded by their pixels, by the starting network as it is, and by networks trained on
them: from that start, from that start with a tenth of the rate below the head, and from random weights, all with the
settings of the recipe `sample` for the same number of epochs, which follows from the seconds. Queries are the 5,000
test images of the five classes. Trains in this process; run it on a quiet machine.

The archive holds train/CLASS/NAME.png and test/CLASS/NAME.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.model import InitConfig
from instdisc.settings.recipes import RECIPES
from instdisc.settings.run import DataConfig, RunConfig
from instdisc.training.start import train

SIZES = {500: 1.0, 5000: 3.0}
"""Images, and the share of `--seconds` that they are trained for."""


def extract(archive: Path, folder: Path) -> None:
    """start/: all images of the first five classes, flat; 500/ and 5000/: random ones of the others; test/."""
    chosen: dict[str, set[str]] = defaultdict(set)
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        by_class: dict[tuple[str, str], list[str]] = defaultdict(list)
        for member in members:
            split, name, _ = member.name.split("/")
            by_class[split, name].append(member.name)
        names = sorted({name for _, name in by_class})
        for number, name in enumerate(names):
            images = sorted(by_class["train", name])
            random.Random(number).shuffle(images)
            if number < 5:
                chosen["start"].update(images)
                continue
            chosen["test"].update(by_class["test", name])
            for size in SIZES:
                chosen[str(size)].update(images[: size // 5])
        for member in members:
            for place, keys in chosen.items():
                if member.name in keys:
                    _, name, file = member.name.split("/")
                    target = folder / place / (f"{name}-{file}" if place == "start" else f"{name}/{file}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    target.write_bytes(content.read())


def configured(images: Path, epochs: int, seed: int, init: InitConfig, scale: float = 1.0) -> RunConfig:
    base = RECIPES["sample"].config
    test = images.parent / "test"
    return dataclasses.replace(
        base,
        data=DataConfig(path=str(images), test_path=None if images.name == "start" else str(test)),
        init=init,
        optimizer=dataclasses.replace(base.optimizer, warmup_epochs=0.06 * epochs, backbone_rate_scale=scale),
        training=dataclasses.replace(base.training, epochs=epochs, seed=seed),
        knn=dataclasses.replace(base.knn, every=0, baselines=scale == 1.0),
        launch=dataclasses.replace(base.launch, num_workers=0),
        metrics=dataclasses.replace(base.metrics, port=0),
        overwrite=True,
    )


def epochs_for(images: Path, seconds: float, directory: Path) -> int:
    trial = train("sample", configured(images, 2, 0, InitConfig()), RunDirectory(directory))
    return max(1, round(seconds * trial["images_per_second"] / trial["num_instances"]))


def measure(folder: Path, seed: int, seconds: float) -> Iterator[dict[str, Any]]:
    start = RunDirectory(folder / "runs" / "start")
    train(
        "sample",
        configured(
            folder / "start", epochs_for(folder / "start", 6 * seconds, start.path), seed, InitConfig()
        ),
        start,
    )
    given = InitConfig(weights=str(start.path))
    for size, share in SIZES.items():
        images, run = folder / str(size), RunDirectory(folder / "runs" / "run")
        epochs = epochs_for(images, share * seconds, run.path)
        row: dict[str, Any] = {"images": size, "seed": seed, "epochs": epochs}
        for name, init, scale in (
            ("from random", InitConfig(), 1.0),
            ("from start", given, 1.0),
            ("from start, rate/10", given, 0.1),
        ):
            summary = train("sample", configured(images, epochs, seed, init, scale), run)
            row |= {name: summary["knn_top1"], f"{name}, seconds": summary["train_seconds"]}
            if scale == 1.0:
                row["start as it is" if init.weights else "random network"] = summary["knn_top1_untrained"]
                row["pixels"] = summary["knn_top1_raw_pixels"]
        yield row


def show(rows: list[dict[str, Any]]) -> None:
    columns = [
        "pixels",
        "random network",
        "start as it is",
        "from random",
        "from start",
        "from start, rate/10",
    ]
    print(f"| images | epochs | seconds | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for size in SIZES:
        chosen = [row for row in rows if row["images"] == size]
        if not chosen:
            continue
        cells = []
        for column in columns:
            values = [100 * row[column] for row in chosen]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and column != "pixels" else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        epochs = statistics.mean(row["epochs"] for row in chosen)
        spent = [row[f"{name}, seconds"] for row in chosen for name in columns[3:]]
        print(f"| {size:,} | {epochs:.0f} | {min(spent):.0f} to {max(spent):.0f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as a tar of PNG files")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of training 500 images; 5,000 get three times"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="add the rows to this file, and show all rows in it")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    with tempfile.TemporaryDirectory() as directory:
        extract(arguments.cifar, Path(directory))
        for seed in arguments.seeds:
            for row in measure(Path(directory), seed, arguments.seconds):
                rows.append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
