"""The evaluation program on a small trained run: figures, Ray, and what it says to bad input."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load

from cluster.partition import Partition
from cluster.settings import ActorsConfig, MetricsConfig
from cluster.snapshot_writer import SnapshotWriter
from cluster.snapshots import open_snapshot
from instdisc.evaluate import main
from instdisc.evaluation import knn
from instdisc.evaluation.context import Evaluation
from instdisc.model.voters import choose_voters
from instdisc.runs.network import NETWORK, load_network
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.evaluation import EvaluationConfig, QueryConfig
from instdisc.train import main as train
from pipelines.manifest import Manifest
from tests import reference
from tests.instdisc.program import BLUE, GREEN, RED, SMALL, bank_of, solid, summary_of, write_pictures
from tests.ray_cluster import RayCluster

Evaluate = Callable[..., tuple[int, str]]
CLASSES = {"red": RED, "green": GREEN, "blue": BLUE}


def train_small(folder: Path, test: Path | None, images: Path | None = None) -> Path:
    images = images or solid(folder / "train", CLASSES, 10)
    arguments = ["sample", *SMALL, "--data.path", str(images), "--run-dir", str(folder / "run")]
    assert train([*arguments, "--data.test-path", str(test), "--training.precision", "float32"]) == 0
    return folder / "run"


def add_snapshot(run_dir: Path, step: int, **attributes: Any) -> Path:
    """One more snapshot of the run: the first one with other attributes."""
    first = open_snapshot(min((run_dir / "snapshots").iterdir()))
    noted = {**first.attributes, **attributes}
    writer = SnapshotWriter(run_dir / "snapshots", Partition(first.num_rows, 1), 0, "test", keep=9)
    tables = {name: first.read(name) for name in first.tables}
    files = {name: first.read_file(name) for name in first.files}
    writer.save(step, tables, files, noted)
    writer.wait()
    assert [report.error for report in writer.poll()] == [None]
    return run_dir / "snapshots" / f"step-{step:09d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with test images, one class of which is unknown to the bank."""
    folder = tmp_path_factory.mktemp("trained")
    test = solid(folder / "test", {**CLASSES, "gray": (120, 120, 120)}, 3)
    return train_small(folder, test)


@pytest.fixture
def evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Evaluate:
    """Run the program with few neighbors; returns status and everything it said."""

    def evaluate(source: Path | str, *more: str) -> tuple[int, str]:
        where = ["--output", str(tmp_path / "out")]
        if "--num-actors" not in more:
            where += ["--num-actors", "0"]
        try:
            status = main([str(source), "--k", "5", *where, *more])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capfd.readouterr()
        return status, captured.out + captured.err + caplog.text

    return evaluate


def result(folder: Path, name: str = "knn") -> dict[str, Any]:
    return json.loads((folder / "out" / f"{name}.json").read_text())


def refused(outcome: tuple[int, str], *texts: str) -> None:
    status, said = outcome
    assert status == 2, said
    assert "Traceback" not in said
    for text in texts:
        assert text in said


def test_stored_and_fresh_embeddings_give_what_training_measured(
    evaluate: Evaluate, trained: Path, tmp_path: Path
) -> None:
    status, said = evaluate(trained)
    assert status == 0, said
    assert "kNN k=5, top-1" in said
    assert "1 classes of the queries have no row in the bank (gray): their 3 queries count as wrong" in said
    stored = result(tmp_path)
    assert stored["unknown_classes"] == {"gray": 3}
    assert (stored["queries"], stored["query_kind"], stored["bank"]) == (12, "test-set", "stored")
    assert stored["accuracies"]["k5"]["top1"] == pytest.approx(summary_of(trained)["knn_top1_bank"])
    assert evaluate(trained, "--recompute")[0] == 0
    fresh = result(tmp_path)
    assert fresh["bank"] == "recomputed"
    assert fresh["accuracies"]["k5"]["top1"] == pytest.approx(summary_of(trained)["knn_top1"])


@pytest.mark.parametrize("more", [(), ("--recompute",)])
def test_two_actors_give_the_same(
    evaluate: Evaluate,
    trained: Path,
    tmp_path: Path,
    ray_cluster: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    assert evaluate(trained, *more)[0] == 0
    here = result(tmp_path)
    status, said = evaluate(trained, *more, "--num-actors", "2")
    assert status == 0, said
    assert result(tmp_path) == here


def test_without_test_images_every_row_is_classified_by_the_others(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    run = train_small(tmp_path, None)
    status, said = evaluate(run, "--queries.root", str(tmp_path))
    assert status == 0, said
    found = result(tmp_path)
    assert (found["query_kind"], found["queries"]) == ("leave-one-out", 30)
    assert found["accuracies"]["k5"]["top1"] == pytest.approx(summary_of(run)["knn_top1_bank"])
    # A snapshot away from its run: its own rows are the queries.
    moved = shutil.copytree(run / "snapshots", tmp_path / "elsewhere" / "snapshots")
    status, said = evaluate(moved)
    assert status == 0, said
    rows = np.asarray(bank_of(run), np.float64)
    labels = np.asarray(Manifest.load(run / "manifest").labels)
    right = 0
    turns = choose_voters(labels, leave_one_out=True).turns
    for row, label in enumerate(labels):
        others = reference.without_one_of_every_class(labels, turns, row)
        votes = reference.weighted_knn(rows[row], rows[others], labels[others], 3, k=5, temperature=0.07)
        right += votes.argmax() == label
    assert result(tmp_path)["accuracies"]["k5"]["top1"] == pytest.approx(right / 30)
    refused(evaluate(moved, "--recompute"), "give the run directory")


def test_a_named_snapshot_brings_its_own_network(tmp_path: Path) -> None:
    images = solid(tmp_path / "images", CLASSES, 10)
    kept = [
        "--snapshots.every-steps",
        "2",
        "--snapshots.keep",
        "9",
        "--snapshots.url",
        str(tmp_path / "elsewhere"),
    ]
    arguments = ["sample", *SMALL, *kept, "--data.path", str(images), "--data.test-path", "None"]
    assert train([*arguments, "--run-dir", str(tmp_path / "run")]) == 0
    run = RunDirectory(tmp_path / "run")
    names = [run.path, *(tmp_path / "elsewhere").glob("step-*")]
    for step, source in ((6, run.path), *((int(each.name[5:]), each) for each in names[1:])):
        snapshot = Evaluation(EvaluationConfig(source=str(source))).source.snapshot
        assert snapshot.step == step
        for name, value in load(snapshot.read_file(NETWORK)).items():
            assert torch.equal(load_network(snapshot).backbone.state_dict()[name], value)


def test_a_snapshot_away_from_its_run_classifies_images(
    evaluate: Evaluate, trained: Path, tmp_path: Path
) -> None:
    """With it alone: the network, what it was given, and the names of the classes are in the snapshot."""
    assert evaluate(trained)[0] == 0
    expected = result(tmp_path)["accuracies"]
    away = tmp_path / "away"
    shutil.copytree(trained / "snapshots", away)
    status, said = evaluate(away, "--queries.path", str(trained.parent / "test"))
    assert status == 0, said
    assert result(tmp_path)["accuracies"] == expected
    refused(evaluate(away, "--recompute"), "give the run directory")
    refused(evaluate(away, "--protocols", "page"), "give the run directory")


def test_what_prometheus_is_told(trained: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        source=str(trained),
        actors=ActorsConfig(num_actors=0),
        output=tmp_path,
        metrics=MetricsConfig(port=9700),
    )
    with Evaluation(config) as evaluation:
        accuracies = knn.run(evaluation, knn.KnnConfig(k=5))["accuracies"]["k5"]
        ((target,),) = (
            each["targets"] for each in json.loads((trained / ".metrics/evaluation-0.json").read_text())
        )
        with urllib.request.urlopen(f"http://{target}/metrics") as answer:
            served = answer.read().decode()
    labels = f'{{rank="0",run="{trained.name}"}}'
    for name, value in {
        "queries_total": 12.0,
        "actors": 0.0,
        "rows": float(len(bank_of(trained))),
        "knn_top1_ratio": accuracies["top1"],
        "knn_top5_ratio": accuracies["top5"],
    }.items():
        assert f"instdisc_evaluation_{name}{labels} {value}\n" in served
    assert not (trained / ".metrics/evaluation-0.json").exists()


def test_training_on_some_classes_and_retrieval_among_the_others(evaluate: Evaluate, tmp_path: Path) -> None:
    colors = {**CLASSES, "white": (250, 250, 250)}
    images, test = solid(tmp_path / "train", colors, 10), solid(tmp_path / "test", colors, 3)
    arguments = ["sample", *SMALL, "--data.path", str(images), "--data.test-path", str(test)]
    arguments += ["--data.classes", "first-half", "--run-dir", str(tmp_path / "run")]
    assert train(arguments) == 0
    assert summary_of(tmp_path / "run")["num_instances"] == 20
    status, said = evaluate(tmp_path / "run", "--protocols", "knn,unseen", "--unseen.ranks", "1")
    assert status == 0, said
    first, second = sorted(colors)[:2], sorted(colors)[2:]
    assert (result(tmp_path)["queries"], result(tmp_path)["unknown_classes"]) == (6, {})
    found = result(tmp_path, "unseen")
    assert (found["classes"], found["classes_seen_in_training"], found["images"]) == (second, [], 6)
    manifest = Manifest.load(tmp_path / "run" / "manifest")
    assert list(manifest.class_names) == first
    plain = write_pictures(tmp_path / "plain", 30)
    arguments = ["sample", *SMALL, "--data.path", str(plain), "--data.classes", "first-half"]
    assert train([*arguments, "--run-dir", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_queries_from_an_array(evaluate: Evaluate, trained: Path, tmp_path: Path, kind: str) -> None:
    rows = np.asarray(bank_of(trained))
    labels = np.asarray(Manifest.load(trained / "manifest").labels).copy()
    paths = [str(tmp_path / f"{name}.{kind}") for name in ("vectors", "labels")]
    for path, array in zip(paths, (100 * rows, labels), strict=True):  # of any length
        np.save(path, array) if kind == "npy" else zarr.save_array(path, array)
    status, said = evaluate(trained, "--queries.path", paths[0], "--queries.labels", paths[1])
    assert status == 0, said
    found = result(tmp_path)
    assert (found["query_kind"], found["queries"]) == ("array", int((labels >= 0).sum()))
    assert found["accuracies"]["k1"]["top1"] == 1.0  # every row finds itself
    queries = QueryConfig(path=paths[0], labels=paths[1])
    asked = Evaluation(EvaluationConfig(source=str(trained), queries=queries)).queries.embeddings
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "labels", "text"),
    [
        (np.zeros((4, 16)), [0, 1, 2, 0], "rows of zeros"),
        (np.ones((4, 16)), [0.0, 1.0, 2.0, np.nan], "expected integers"),
    ],
)
def test_arrays_that_are_no_queries(
    evaluate: Evaluate, trained: Path, tmp_path: Path, vectors: Any, labels: Any, text: str
) -> None:
    np.save(tmp_path / "vectors.npy", vectors)
    np.save(tmp_path / "labels.npy", np.array(labels))
    given = [
        "--queries.path",
        str(tmp_path / "vectors.npy"),
        "--queries.labels",
        str(tmp_path / "labels.npy"),
    ]
    refused(evaluate(trained, *given), text)


def test_files_that_are_no_arrays(evaluate: Evaluate, trained: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.npy"
    np.save(labels, [0, 1])
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "several.npz", np.ones(2))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    np.save(tmp_path / "words.npy", np.full((2, 16), "a"))
    for name, text in (
        ("empty", "not a readable array"),
        ("several", "several arrays"),
        ("words", "expected numbers"),
    ):
        path = str(tmp_path / f"{name}.npy")
        refused(evaluate(trained, "--queries.path", path, "--queries.labels", str(labels)), text)


def test_array_queries_that_do_not_fit(evaluate: Evaluate, trained: Path, tmp_path: Path) -> None:
    rows = bank_of(trained)
    vectors, narrow = tmp_path / "vectors.npy", tmp_path / "narrow.npy"
    labels, strange = tmp_path / "labels.npy", tmp_path / "strange.npy"
    np.save(vectors, rows[:4])
    np.save(narrow, rows[:4, :7])
    np.save(labels, [0, 1, 2, 0])
    np.save(strange, [70, 71, 72, 73])
    refused(evaluate(trained, "--queries.path", str(vectors)), "--queries.labels")
    named = ("--queries.labels", str(labels))
    refused(evaluate(trained, "--queries.path", str(narrow), *named), "7 dimensions and the bank 16")
    refused(evaluate(trained, "--queries.path", str(tmp_path / "no.npy"), *named), "no.npy", ".npy file")
    refused(
        evaluate(trained, "--queries.path", str(vectors), "--queries.labels", str(strange)), "names no class"
    )
    other = tmp_path / "other.zarr"
    zarr.save_array(other, rows[:4])
    zarr.open_array(other).attrs["backbone"] = "resnet50"
    refused(evaluate(trained, "--queries.path", str(other), *named), "backbone resnet50")


def test_query_images_that_do_not_fit(evaluate: Evaluate, trained: Path, tmp_path: Path) -> None:
    refused(evaluate(trained, "--queries.path", str(tmp_path / "nowhere")), "--queries.path", "nowhere")
    plain = write_pictures(tmp_path / "plain", 4)
    refused(evaluate(trained, "--queries.path", str(plain)), "has a label")
    strange = solid(tmp_path / "strange", {"cat": RED, "dog": BLUE}, 2)
    refused(
        evaluate(trained, "--queries.path", str(strange)),
        "none of the training images' classes",
        "cat",
        "red",
    )
    broken = solid(tmp_path / "broken", CLASSES, 4)
    whole = (broken / "red" / "1.png").read_bytes()
    (broken / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    refused(evaluate(trained, "--queries.path", str(broken)), "cannot be decoded", "red/1.png")
    (broken / "red" / "1.png").write_bytes(b"no image")
    refused(evaluate(trained, "--queries.path", str(broken)), "cannot be read", "red/1.png")


def test_k_beyond_the_bank(evaluate: Evaluate, trained: Path) -> None:
    assert "kNN k=30, top-1" in evaluate(trained, "--k", "31")[1]
    refused(evaluate(trained, "--k", "0"), "k is 0")
    refused(evaluate(trained, "--protocols", "knn,nearest"), "nearest", "knn, linear")


def test_a_bank_without_labels(evaluate: Evaluate, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "plain", 12)
    assert train(["sample", *SMALL, "--data.path", str(images), "--run-dir", str(tmp_path / "run")]) == 0
    refused(evaluate(tmp_path / "run"), "has no labels")


def test_snapshots_that_cannot_be_used(evaluate: Evaluate, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    refused(evaluate(tmp_path / "nowhere"), "nowhere")
    good = next((run / "snapshots").glob("step-*"))
    later = add_snapshot(run, step=1000)
    assert evaluate(run)[0] == 0
    assert result(tmp_path)["step"] == 1000
    assert evaluate(good)[0] == 0
    assert result(tmp_path)["step"] < 1000
    chunk = next(
        each for each in later.rglob("embeddings/**/*") if each.is_file() and each.name != "zarr.json"
    )
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    refused(evaluate(later), "checksum", "embeddings")
    (later / "COMMIT.json").unlink()
    refused(evaluate(later), "never finished")
    refused(evaluate(add_snapshot(run, step=1001, settings={})), "holds no network with its settings")
    refused(evaluate(add_snapshot(run, step=1002, manifest_fingerprint="other")), "images listed in")


def test_help_names_the_protocols(evaluate: Evaluate) -> None:
    status, said = evaluate("--help")
    assert status == 0
    for text in ("--protocols", "--queries.path", "--k ", "--num-actors", "--recompute", "--output"):
        assert text in said
