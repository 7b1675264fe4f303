"""Numbers without labels while training: the same for any number of ranks, kept by a run that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster.snapshots import snapshot_steps
from instdisc.evaluate import main as evaluate
from instdisc.model import label_free
from instdisc.model.label_free import LabelFree, raw_pixels
from instdisc.runs.run_directory import RunDirectory
from instdisc.train import main as train
from instdisc.training.label_free import START, TRAINED, LabelFreeMonitor
from instdisc.training.report import report
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from tests.instdisc.program import SMALL, summary_of, write_pictures
from tests.instdisc.training.test_trainer import make_trainer
from tests.processes import run_ranks


def measure(rank: int, world_size: int, images: Path, sampled: int) -> dict[str, LabelFree | None]:
    label_free.MOST_IMAGES = sampled  # in a process of its own
    trainer = make_trainer(rank, world_size)
    manifest = build_manifest(resolve(str(images), root=images, download=False), show_progress=False)
    monitor = LabelFreeMonitor(trainer, manifest, lambda *_: None)
    found = monitor.measure({"raw_pixels": raw_pixels, TRAINED: trainer.embed})
    assert monitor.neighbors_changed is None
    with torch.no_grad():
        for parameter in trainer.embedder.parameters():
            parameter.neg_()
    again = monitor.measure({TRAINED: trainer.embed})
    assert monitor.neighbors_changed is not None
    assert 0 <= monitor.neighbors_changed <= 1
    monitor.measure({TRAINED: trainer.embed})
    assert monitor.neighbors_changed == 0
    return {**found, "again": again[TRAINED]}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sampled", [11, 100])
def test_any_number_of_ranks_measures_the_same(tmp_path: Path, world_size: int, sampled: int) -> None:
    images = write_pictures(tmp_path / "images", 20)
    (images / "005.png").write_bytes(
        (images / "005.png").read_bytes()[:60]
    )  # found to be broken when it is decoded
    (alone,) = run_ranks(1, measure, images, sampled)
    for found in run_ranks(world_size, measure, images, sampled):
        for name, numbers in alone.items():
            assert found[name] == pytest.approx(numbers, rel=1e-4), name
    assert alone["raw_pixels"].images == (sampled if sampled == 11 else 19)


def test_more_ranks_than_images_measure_too(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 20)
    first, *others = run_ranks(3, measure, images, 2)
    assert first["raw_pixels"].images == 2
    assert others == [first, first]


def test_a_run_without_labels_has_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, run_dir = write_pictures(tmp_path / "images", 40), tmp_path / "run"
    command = [
        "sample",
        *SMALL,
        "--data.path",
        str(images),
        "--data.test-path",
        "None",
        "--run-dir",
        str(run_dir),
    ]
    assert train([*command, "--knn.every", "1"]) == 0
    first = summary_of(run_dir)
    assert "images found by another view" in capsys.readouterr().out
    assert first["label_free_images"] == 40
    assert first["knn_top1"] is None
    numbers = first["label_free"]
    assert set(numbers) == {
        "effective_rank",
        "alignment",
        "uniformity",
        "instance_recall_1",
        "instance_recall_10",
    }
    assert all(value is not None for each in numbers.values() for value in each.values())
    run = RunDirectory(run_dir)
    lines = [(line["epoch"], line["of"]) for line in run.label_free()]
    assert lines == [(0, "raw_pixels"), (0, START), (1, TRAINED), (2, TRAINED)]

    # Longer: the start stays, the numbers of the end are new ones.
    assert train([*command, "--knn.every", "1", "--training.epochs", "4"]) == 0
    longer = summary_of(run_dir)["label_free"]
    assert [(line["epoch"], line["of"]) for line in run.label_free()] == [*lines, (3, TRAINED), (4, TRAINED)]
    for name, each in numbers.items():
        assert (longer[name]["start"], longer[name]["raw_pixels"]) == (each["start"], each["raw_pixels"])
    assert longer["alignment"]["trained"] != numbers["alignment"]["trained"]

    # An evaluation finds what training did.
    assert (
        evaluate([str(run_dir), "--protocols", "label-free", "--num-actors", "0", "--metrics.port", "0"]) == 0
    )
    (written,) = run_dir.glob("evaluation/*/label-free.json")
    found = json.loads(written.read_text())
    assert found["images"] == 40
    for name, each in longer.items():
        assert found["label_free"][name] == pytest.approx(each, rel=1e-5)


def test_a_summary_of_an_earlier_release_is_reported_without_them(tmp_path: Path) -> None:
    images, run_dir = write_pictures(tmp_path / "images", 16), tmp_path / "run"
    command = [
        "sample",
        *SMALL,
        "--data.path",
        str(images),
        "--data.test-path",
        "None",
        "--run-dir",
        str(run_dir),
    ]
    assert train(command) == 0
    summary = summary_of(run_dir)
    earlier: dict[str, Any] = {
        name: value for name, value in summary.items() if not name.startswith("label_free")
    }
    assert "without labels" in report(summary, RunDirectory(run_dir))
    for start, advice in ((0.1, "training has helped, as far as"), (0.3, "training has not helped yet")):
        recall = {**summary["label_free"]["instance_recall_10"], "start": start, "trained": 0.25}
        numbers = {**summary["label_free"], "instance_recall_10": recall}
        said = report({**summary, "label_free": numbers}, RunDirectory(run_dir))
        assert f"25.0% are found among the 10 nearest, {100 * start:.1f}% at the start: {advice}" in said
        labeled = {"knn_top1": 0.5, "knn_protocol": "test-set"}
        assert "the one to keep" not in report({**summary, **labeled}, RunDirectory(run_dir))
    assert "without labels" not in report(earlier, RunDirectory(run_dir))


@pytest.mark.parametrize("number", ["knn", "instance_recall_10"])
def test_the_best_measured_snapshot_is_kept_beside_the_newest(tmp_path: Path, number: str) -> None:
    images, out = write_pictures(tmp_path / "images", 24, classes=2), tmp_path / "run"
    options = [
        "--data.path",
        str(images),
        "--data.test-path",
        "None",
        "--knn.every",
        "1",
        "--run-dir",
        str(out),
    ]
    options += ["--snapshots.keep", "1", "--snapshots.keep-best", number, "--optimizer.learning-rate", "1"]
    field = "knn_top1_recomputed" if number == "knn" else number
    for epochs in ("4", "6"):  # the second command resumes, and goes by what the first one measured too
        assert train(["sample", *SMALL, *options, "--training.epochs", epochs]) == 0
        lines = RunDirectory(out).measurements()
        values = {line["epoch"] * 3: line[field] for line in lines if field in line}
        assert list(values) == [3 * epoch for epoch in range(1, int(epochs) + 1)]
        kept = snapshot_steps(out / "snapshots")
        best = summary_of(out)["best_snapshot"]
        assert best["by"] == number
        assert best["value"] == values[best["step"]] == max(values[step] for step in kept)
        assert kept[-1] == 3 * int(epochs)
        assert len(kept) <= 2


def test_keeping_the_best_by_labels_needs_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_pictures(tmp_path / "images", 16)
    options = ["--data.path", str(images), "--data.test-path", "None", "--run-dir", str(tmp_path / "run")]
    assert train(["sample", *SMALL, *options, "--snapshots.keep-best", "knn"]) == 2
    assert "instance_recall_1 needs none" in capsys.readouterr().err


def test_measuring_does_not_warn_of_constant_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / f"{number}.png")
    trainer, manifest = make_trainer(0, 1), build_manifest(tmp_path, show_progress=False)
    LabelFreeMonitor(trainer, manifest, lambda *_: None).measure({TRAINED: trainer.embed})
    assert "nearly constant" not in caplog.text  # training warns of them, once
