"""Which numbers without labels follow the accuracy: many runs, good and bad, measured after every epoch.

    python benchmarks/label_free.py [--epochs 5] [--seeds 0] [--only "NAME;…"] [--jsonl FILE] [any option of train]

Trains ResNet-8 on the bundled sample in this process, once for each line of `RUNS`: all objectives, good and bad rates,
temperatures and augmentations, and networks that collapse. After every epoch, and before the first, training measures
the kNN accuracy of the 1,000 test images (k = 200, recomputed embeddings) and the numbers without labels. The table
has Spearman's rank correlation of each number with that accuracy: over all measurements, the median within a run, and
over the last measurements of the runs, on which a choice between runs rests. `regret` is what that choice costs: the
best accuracy at a run's end less that of the run with the best number. Where less is said to be better the sign is
turned. A run that is in the file is not repeated. Options of `instdisc.train` apply to every run: other images with
`--data.path`, `--data.test-path` and `--backbone.name`, for example.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from instdisc.common.files import append_line, read_lines
from instdisc.train import main as train

TWO_VIEWS = ["sample"]
BANK = [
    "cifar10-softmax",
    "--data.path",
    "sample",
    "--data.test-path",
    "sample:test",
    "--backbone.name",
    "resnet8",
]
NCE = ["cifar10-npid", *BANK[1:]]
INFONCE = ["cifar10-infonce", *BANK[1:]]
PARAMETRIC = ["cifar10-parametric", *BANK[1:]]
RATE, TEMPERATURE = "--optimizer.learning-rate", "--objective.temperature"
NO_CROP = ["--augmentation.crop-scale", "1", "1", "--augmentation.crop-ratio", "1", "1"]
NO_COLOUR = ["--augmentation.jitter-probability", "0", "--augmentation.grayscale-probability", "0"]
PLAIN = [*NO_CROP, *NO_COLOUR, "--augmentation.flip-probability", "0"]

RUNS: dict[str, list[str]] = {
    "spreading": TWO_VIEWS,
    "spreading, temperature 0.5": [*TWO_VIEWS, TEMPERATURE, "0.5"],
    "spreading, temperature 0.02": [*TWO_VIEWS, TEMPERATURE, "0.02"],
    "spreading, rate 0.001": [*TWO_VIEWS, RATE, "0.001"],
    "spreading, rate 1": [*TWO_VIEWS, RATE, "1", "--optimizer.warmup-epochs", "0"],
    "spreading, no augmentation": [*TWO_VIEWS, *PLAIN],
    "spreading, no crop": [*TWO_VIEWS, *NO_CROP],
    "softmax": BANK,
    "softmax, rate 0.3": [*BANK, RATE, "0.3"],
    "softmax, no augmentation": [*BANK, *PLAIN],
    "nce": [*NCE, RATE, "0.03"],
    "nce, rate 1": [*NCE, RATE, "1", "--optimizer.warmup-epochs", "0"],
    "infonce": [*INFONCE, TEMPERATURE, "0.1", "--objective.num-negatives", "2048"],
    "parametric": PARAMETRIC,
}
NUMBERS = {
    "instance_recall_1": 1,
    "instance_recall_10": 1,
    "effective_rank": 1,
    "alignment": -1,
    "uniformity": -1,
    "neighbors_changed": -1,
    "loss": -1,
}
COMMON = ["--num-workers", "0", "--knn.every", "1", "--metrics.port", "0", "--training.batch-size", "128"]


def measured(name: str, seed: int, epochs: int, run_dir: Path, more: list[str]) -> list[dict[str, Any]]:
    """A point for every measurement of one run."""
    options = [*RUNS[name], *COMMON, "--training.epochs", str(epochs), "--training.seed", str(seed), *more]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = train([*options, "--run-dir", str(run_dir), "--overwrite"])
    if status == 130:
        raise KeyboardInterrupt
    if status == 2:
        raise SystemExit(said.getvalue())
    lines = read_lines(run_dir / "metrics.jsonl")
    accuracy = {line["epoch"]: line["knn_top1_recomputed"] for line in lines if line["kind"] == "knn"}
    accuracy[0] = next(line["untrained"] for line in lines if line["kind"] == "baselines")
    # Lines come every ten steps: the last one of an epoch stands for its end.
    losses = {math.ceil(line["epoch"]): line["loss"] for line in lines if line["kind"] == "train"}
    points = [
        {"run": name, "seed": seed, "knn": accuracy[line["epoch"]], "loss": losses.get(line["epoch"]), **line}
        for line in lines
        if line["kind"] == "label_free" and line["of"] != "raw_pixels" and line["epoch"] in accuracy
    ]
    if status:
        print(
            f"{name}: ended with {status} after {len(points)} measurements: {said.getvalue().splitlines()[-1][:100]}"
        )
    return points


def correlation(points: list[dict[str, Any]], number: str) -> float | None:
    """Spearman's, the sign turned where less is better; None where too few points have the number, or all the same."""
    pairs = [(point[number], point["knn"]) for point in points if point.get(number) is not None]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    return NUMBERS[number] * float(spearmanr(*zip(*pairs, strict=True)).statistic)


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: the correlations, then the runs at their ends."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in points:
        runs.setdefault((point["run"], point["seed"]), []).append(point)
    last = [run[-1] for run in runs.values()]
    best = max(point["knn"] for point in last)
    lines = [
        f"{len(points)} measurements of {len(runs)} runs, {points[0]['images']:,} images.",
        "",
        "| number | all measurements | within a run, median (least) | runs at their ends | regret, points |",
        "|---|---|---|---|---|",
    ]
    for number, sign in NUMBERS.items():
        within = [each for run in runs.values() if (each := correlation(run, number)) is not None]
        known = (point for point in last if point.get(number) is not None)
        chosen = max(known, key=lambda point: sign * point[number], default=None)
        cells = [
            _text(correlation(points, number)),
            f"{_text(statistics.median(within))} ({_text(min(within))})" if within else "–",
            _text(correlation(last, number)),
            f"{100 * (best - chosen['knn']):.1f} ({chosen['run']})" if chosen else "–",
        ]
        lines.append(f"| {number}{' (turned)' if sign < 0 else ''} | {' | '.join(cells)} |")
    shown = ["knn", "instance_recall_1", "instance_recall_10", "effective_rank", "alignment", "uniformity"]
    lines += ["", f"| run at its end | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for point in sorted(last, key=lambda each: -each["knn"]):
        values = (
            f"{100 * point[name]:.1f}%" if name in shown[:3] else f"{point[name]:.2f}" for name in shown
        )
        lines.append(f"| {point['run']} | {' | '.join(values)} |")
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", help="names of runs, separated by semicolons")
    parser.add_argument("--jsonl", type=Path, help="where points are kept")
    arguments, more = parser.parse_known_args()
    names = arguments.only.split(";") if arguments.only else list(RUNS)
    with tempfile.TemporaryDirectory() as directory:
        points = Path(directory, "points.jsonl") if arguments.jsonl is None else arguments.jsonl
        points.touch()
        done = {(point["run"], point["seed"]) for point in read_lines(points)}
        for seed in arguments.seeds:
            for name in names:
                if (name, seed) not in done:
                    for point in measured(name, seed, arguments.epochs, Path(directory, "run"), more):
                        append_line(points, point)
        print(table(read_lines(points)))


if __name__ == "__main__":
    main()
