"""What is printed at the end of a training run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from instdisc.runs.run_directory import RunDirectory
from pipelines.datasets import SPLITS


def report(summary: dict[str, Any], run: RunDirectory) -> str:
    """What to print at the end: accuracies, where things are, what to do next."""
    lines = ["", *_accuracies(summary), *_label_free(summary)]
    place, python = _from_here(run.path), _from_here(Path(sys.executable))
    recipe, config = run.stored_config()
    commands = {
        f"evaluate {place} --protocols statistics,page --num-actors 0": "a page of results",
        f"explore {place} --num-actors 0": "duplicates, strangers and clusters",
        f"search {place} IMAGE": "the nearest images to any image file",
        f"embed {place} --output {_from_here(Path('indexes', run.path.name))}": "an index that images join and leave",
        f"train {recipe} --help": "every setting",
    }
    if config.data.path in SPLITS:
        commands["train auto --data.path FOLDER --minutes 30"] = "images of your own"
    lines += [
        f"{summary['num_instances']:,} images, {summary['world_size']} worker(s) on {summary['device']}, "
        f"{summary['train_seconds']:.0f} s of training, {summary['images_per_second']:,.0f} images/s, "
        f"{100 * summary['loader_wait_fraction']:.1f}% of the time waiting for images",
        f"run directory: {place}",
        "",
        "next:",
        f"  head {place}/summary.json {place}/metrics.jsonl",
        *(f"  {python} -m instdisc.{command}     # {text}" for command, text in commands.items()),
    ]
    return "\n".join(lines)


def _accuracies(summary: dict[str, Any]) -> list[str]:
    """The table of kNN accuracies, with what they rest on; summaries of earlier releases lack some of it."""
    if summary["knn_top1"] is None:
        return []
    untrained = "network at its start" if summary.get("init_weights") else "untrained network"
    names = {
        "_raw_pixels": "raw pixels",
        "_raw_pixels_whitened": "raw pixels, whitened",
        "_untrained": untrained,
        "_untrained_whitened": f"{untrained}, whitened",
        "_untrained_features": f"{untrained}, features",
        "": f"trained, {summary['epochs']} epochs",
        "_whitened": "trained, whitened",
        "_features": "trained, features of last stage",
        "_bank": "trained, classified by the bank",
    }
    k, bank_k, rows = (summary.get(name) for name in ("knn_k", "knn_k_bank", "knn_rows"))
    basis = "" if k is None else f", k = {k}" if k == bank_k else f", k = {k}, with the bank {bank_k}"
    basis += "" if rows is None else f", {rows:,} labeled rows"
    lines = [f"weighted kNN top-1 / balanced over classes ({summary['knn_protocol']}{basis})"]
    for end, name in names.items():
        top1, balanced = summary.get(f"knn_top1{end}"), summary.get(f"knn_balanced{end}")
        if top1 is not None:
            beside = "" if balanced is None else f" /{100 * balanced:5.1f}%"
            lines.append(f"  {name:<33}{100 * top1:5.1f}%{beside}")
    if summary.get("readout") is not None:
        lines.append(f"  the training images alone choose to read out: {summary['readout']}")
    wrong = {
        "knn_unknown_classes": "queries are of classes that no training image has: they count as wrong",
        "knn_without_neighbor": "queries have no labeled neighbor: they count as wrong",
    }
    return [*lines, *(f"  {summary[name]:,} {text}" for name, text in wrong.items() if summary.get(name))]


def _label_free(summary: dict[str, Any]) -> list[str]:
    """The table of numbers without labels; summaries of earlier releases have none."""
    numbers, images = summary.get("label_free"), summary.get("label_free_images")
    if not numbers or not images:
        return []
    start = "start" if summary.get("init_weights") else "untrained"
    names = {
        "instance_recall_1": "images found by another view",
        "instance_recall_10": "  among the 10 nearest",
        "effective_rank": "effective rank",
        "alignment": "alignment",
        "uniformity": "uniformity",
    }
    lines = [f"without labels, {images:,} images {'pixels':>13} {start:>10} {'trained':>10}"]
    for name, text in names.items():
        values = (numbers[name][of] for of in ("raw_pixels", "start", "trained"))
        lines.append(f"  {text:<30}" + "".join(f"{_number(name, value):>11}" for value in values))
    if summary["knn_top1"] is None:
        lines += [f"  {line}" for line in _advice(numbers["instance_recall_10"])]
    return lines


def _advice(recall: dict[str, float | None]) -> list[str]:
    """What instance recall at 10 says of a run without labels; docs/evaluation.md has what this rests on."""
    start, trained = recall["start"], recall["trained"]
    if start is None or trained is None:
        return []
    helped = "training has helped, as far as anything can tell without labels"
    not_yet = "training has not helped yet; train longer, or with other settings"
    return [
        f"{100 * trained:.1f}% are found among the 10 nearest, {100 * start:.1f}% at the start: "
        f"{helped if trained > start else not_yet}",
        "of runs on the same images with the same augmentation, the one with the highest is the one to keep",
    ]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if name.startswith("instance_recall") else f"{value:.2f}"


def _from_here(path: Path) -> str:
    """A path as one would type it."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
