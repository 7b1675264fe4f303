"""Accuracy of every objective on the bundled sample: same network, about the same seconds of training, several seeds.

    python benchmarks/accuracy.py [--seconds 60] [--seeds 0 1 2] [--only NAME ...] [--json FILE]

An objective gets as many epochs as fit into the seconds at the speed of a short trial run, so that its schedule ends
with the budget. Trains in this process; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.settings.recipes import RECIPES
from instdisc.settings.run import RunConfig
from instdisc.training.start import train

# Settings other than the objective are those of the recipe `sample`, but for these.
OBJECTIVES: dict[str, tuple[ObjectiveConfig, dict[str, Any]]] = {
    "nce": (NCEConfig(temperature=0.1), {"bank_momentum": 0.7, "learning_rate": 0.03, "warmup": 0.3}),
    "softmax": (SoftmaxConfig(temperature=0.1), {"bank_momentum": 0.7, "learning_rate": 0.03, "warmup": 0.3}),
    "infonce": (
        InfoNCEConfig(temperature=0.1, num_negatives=4096),
        {"bank_momentum": 0.7, "learning_rate": 0.03, "warmup": 0.3},
    ),
    "parametric": (ParametricSoftmaxConfig(), {}),
    "spreading": (SpreadingConfig(), {}),
    "spreading, key gradient": (SpreadingConfig(key_gradient=True), {}),
    "spreading, paper": (SpreadingConfig(form="paper", key_gradient=True), {}),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies from 0 to 1."""

    objective: str
    epochs: int
    seconds: float
    knn_top1: list[float]
    knn_top1_whitened: list[float]
    knn_top1_bank: list[float]
    raw_pixels: float
    untrained: list[float]


def configured(name: str, epochs: int, seed: int, directory: Path) -> RunConfig:
    base = RECIPES["sample"].config
    objective, changes = OBJECTIVES[name]
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=changes.get("learning_rate", base.optimizer.learning_rate),
        warmup_epochs=epochs * changes.get("warmup", 0.06),
    )
    return dataclasses.replace(
        base,
        objective=objective,
        optimizer=optimizer,
        bank=dataclasses.replace(base.bank, momentum=changes.get("bank_momentum", base.bank.momentum)),
        training=dataclasses.replace(base.training, epochs=epochs, seed=seed),
        knn=dataclasses.replace(base.knn, every=0),
        launch=dataclasses.replace(base.launch, num_workers=0),
        metrics=dataclasses.replace(base.metrics, port=0),
        run_dir=directory,
        overwrite=True,
    )


def run(name: str, epochs: int, seed: int, directory: Path) -> dict[str, Any]:
    return train("sample", configured(name, epochs, seed, directory), RunDirectory(directory))


def measure(name: str, seconds: float, seeds: list[int], directory: Path) -> Row:
    trial = run(name, 2, 0, directory)
    epochs = max(1, round(seconds * trial["images_per_second"] / trial["num_instances"]))
    runs = [run(name, epochs, seed, directory) for seed in seeds]
    return Row(
        objective=name,
        epochs=epochs,
        seconds=statistics.mean(each["train_seconds"] for each in runs),
        knn_top1=[each["knn_top1"] for each in runs],
        knn_top1_whitened=[each["knn_top1_whitened"] for each in runs],
        knn_top1_bank=[each["knn_top1_bank"] for each in runs],
        raw_pixels=runs[0]["knn_top1_raw_pixels"],
        untrained=[each["knn_top1_untrained"] for each in runs],
    )


def print_row(row: Row) -> None:
    def percent(values: list[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    print(
        f"{row.objective:<26}{row.epochs:>7}{row.seconds:>9.0f}{percent(row.knn_top1):>14}"
        f"{percent(row.knn_top1_whitened):>14}{percent(row.knn_top1_bank):>14}"
        f"{100 * row.raw_pixels:>12.1f}{percent(row.untrained):>14}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    print(f"{'objective':<26}{'epochs':>7}{'seconds':>9}{'kNN top-1 %':>14}", end="")
    print(f"{'whitened %':>14}{'bank %':>14}{'pixels %':>12}{'untrained %':>14}")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.only:
            rows.append(measure(name, arguments.seconds, arguments.seeds, Path(directory) / "run"))
            print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
