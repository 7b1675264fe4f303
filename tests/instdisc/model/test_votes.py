"""Weighted kNN against a float64 transcription, whole and in shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.exchange import Exchange
from cluster.group import Worker
from cluster.partition import Partition
from instdisc.model.bank import random_unit_rows
from instdisc.model.label_free import raw_pixels
from instdisc.model.voters import choose_voters
from instdisc.model.votes import Accuracy, count_hits, ranks_of, shard_top_k, weighted_votes
from instdisc.settings.model import BackboneConfig
from instdisc.settings.run import DataConfig, KnnMonitorConfig, RunConfig, TrainingConfig
from instdisc.training.monitor import KnnMonitor, Measured, Queries, knn_accuracy
from instdisc.training.trainer import Trainer
from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.loader import LoaderConfig
from pipelines.manifest import Manifest
from tests import reference
from tests.processes import run_ranks


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_top_k_is_exact_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("instdisc.model.votes._BLOCK_ENTRIES", 5 * block)
    queries, rows = random_unit_rows(0, 5, 8, seed=1), random_unit_rows(0, 60, 8, seed=2)
    excluded = torch.tensor([-1, 3, 59, 100, 0])
    scores, positions = shard_top_k(queries, rows, 70, excluded_G=excluded)
    for query in range(5):
        exact = rows.double() @ queries[query].double()
        order = [row for row in torch.argsort(-exact).tolist() if row != excluded[query]]
        assert positions[query, : len(order)].tolist() == order
        torch.testing.assert_close(scores[query, : len(order)].double(), exact[order], rtol=0, atol=1e-6)
        assert (positions[query, len(order) :] == -1).all()
        assert (scores[query, len(order) :] == -torch.inf).all()


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_votes_are_the_formula_up_to_a_factor(temperature: float) -> None:
    queries, rows = random_unit_rows(0, 6, 8, seed=1), random_unit_rows(0, 50, 8, seed=2)
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    scores, positions = shard_top_k(queries, rows, 20)
    votes = weighted_votes(scores, labels[positions], 4, temperature=temperature).double().numpy()
    for query in range(6):
        expected = reference.weighted_knn(
            queries[query].double().numpy(),
            rows.double().numpy(),
            labels.numpy(),
            4,
            k=20,
            temperature=temperature,
        )
        np.testing.assert_allclose(votes[query] / votes[query].sum(), expected / expected.sum(), atol=1e-3)


def test_rows_without_a_label_do_not_vote() -> None:
    similarities = torch.tensor([[0.9, 0.8, 0.7, -torch.inf], [-torch.inf] * 4])
    votes = weighted_votes(similarities, torch.tensor([[-1, 1, 1, 0], [0, 1, 2, 2]]), 3, temperature=0.1)
    assert votes[0].argmax() == 1
    assert votes[0, 0] == 0
    assert (votes[1] == 0).all()


def test_ranks_count_the_classes_with_more_votes() -> None:
    """Classes 0 and 2 have equal votes, and the nearest neighbor is of class 2."""
    votes, labels = torch.tensor([[0.5, 0.2, 0.5, 0.0]]).expand(6, -1), torch.tensor([[2, 0, 1, -1]])
    ranks = ranks_of(votes, labels.expand(6, -1), torch.tensor([0, 1, 2, 3, 4, 9]))
    assert ranks[:3].tolist() == [1, 2, 0]
    assert (ranks[3:] > 1000).all()


def test_hits_against_a_transcription(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instdisc.model.votes._BLOCK_ENTRIES", 64)
    generator = np.random.default_rng(0)
    scores = -np.sort(-generator.uniform(-1, 1, (50, 20)).astype(np.float32), axis=1)
    labels, truth = generator.integers(-1, 9, (50, 20)), generator.integers(0, 11, 50)
    scores[3], labels[3], truth[4] = -np.inf, -1, -1  # no neighbor; a query that could not be decoded
    expected = np.zeros((4, 11))
    for query in set(range(50)) - {4}:
        votes = np.zeros(9)
        voting = labels[query] >= 0
        np.add.at(votes, labels[query][voting], np.exp(scores[query][voting].astype(np.float64) / 0.1))
        order = [number for number in np.argsort(-votes, kind="stable") if votes[number] > 0]
        hits = [1, truth[query] in order[:1], truth[query] in order[:5], not order]
        expected[:, truth[query]] += hits
    arrays = (torch.from_numpy(each) for each in (scores, labels, truth))
    found = count_hits(*arrays, 9, 11, temperature=0.1)
    np.testing.assert_array_equal(found.numpy(), expected)
    accuracy = Accuracy.of(found, 20)
    assert accuracy is not None
    assert (accuracy.queries, accuracy.without_neighbor) == (49, 1)
    assert accuracy.top1 == expected[1].sum() / 49
    assert accuracy.balanced == pytest.approx((expected[1] / expected[0]).mean())
    assert Accuracy.of(torch.zeros(4, 2), 20) is None


def sharded(rank: int, world_size: int, leave_one_out: bool, k: int | None) -> tuple[float, ...]:
    """Top-1, top-5, balanced and k of the queries below; the last class of the queries is none of the rows'."""
    rows, labels = random_unit_rows(0, 90, 8, seed=2), torch.arange(90) % 5
    labels[7] = labels[80] = -1
    voters = choose_voters(labels.numpy(), leave_one_out=leave_one_out)
    partition = Partition(90, world_size)
    first, last = np.searchsorted(voters.rows, [partition.start(rank), partition.stop(rank)])
    if leave_one_out:
        places = torch.arange(0, 88, 2)[rank::world_size]
        chosen = torch.from_numpy(voters.rows)[places]
        queries = Queries(rows[chosen], labels[chosen], places, 5)
    else:
        chosen = torch.arange(31)[rank::world_size]
        queries = Queries(random_unit_rows(0, 31, 8, seed=5)[chosen], chosen % 6, None, 6)
    shard = rows[voters.rows[first:last]], torch.arange(first, last)
    config = KnnMonitorConfig(k=k)
    found = knn_accuracy(Exchange(rank, world_size), config, voters, queries, shard)
    assert found is not None
    return found.top1, found.top5, found.balanced, float(found.k)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("k", [1, 500, None])
def test_shards_classify_as_the_whole(leave_one_out: bool, k: int | None) -> None:
    rows, labels = random_unit_rows(0, 90, 8, seed=2).double().numpy(), np.arange(90) % 5
    labels[[7, 80]] = -1
    voters = choose_voters(labels, leave_one_out=leave_one_out)
    if leave_one_out:
        numbers = voters.rows[np.arange(0, 88, 2)]
        queries, truth = rows[numbers], labels[numbers]
    else:
        queries, truth = random_unit_rows(0, 31, 8, seed=5).double().numpy(), np.arange(31) % 6
    used = {1: 1, 500: 88, None: 25 - leave_one_out}[k]  # 18 rows of most classes, 17 of two
    ranks = []
    for number, (query, label) in enumerate(zip(queries, truth, strict=True)):
        allowed = voters.rows
        if leave_one_out:
            allowed = reference.without_one_of_every_class(voters.labels, voters.turns, 2 * number)
            allowed = voters.rows[allowed]
        votes = reference.weighted_knn(query, rows[allowed], labels[allowed], 6, k=used, temperature=0.07)
        order = [each for each in np.argsort(-votes, kind="stable") if votes[each] > 0]
        ranks.append(order.index(label) if label in order else 99)
    found = np.array(ranks)
    balanced = np.mean([(found[truth == label] < 1).mean() for label in np.unique(truth)])
    expected = ((found < 1).mean(), (found < 5).mean(), balanced, used)
    for world_size in (1, 2, 3):
        results = run_ranks(world_size, sharded, leave_one_out, k)
        assert all(result == pytest.approx(expected) for result in results)


def measure_one(rank: int, world_size: int, directory: str) -> Measured:
    torch.set_num_threads(1)
    config = RunConfig(
        data=DataConfig(path="unused"),
        augmentation=Augmentation(image_size=32),
        backbone=BackboneConfig(name="resnet8", embedding_dim=16),
        training=TrainingConfig(batch_size=12),
        knn=KnnMonitorConfig(k=3),
        loader=LoaderConfig(backend="host", threads=1),
    )
    trainer = Trainer(Worker(rank, world_size, rank, world_size, 0, torch.device("cpu")), config, 24)
    train, test = Manifest.load(f"{directory}/train.manifest"), Manifest.load(f"{directory}/test.manifest")
    monitor = KnnMonitor(trainer, train, test, lambda *_: None)
    return monitor.measure({"network": trainer.embed, "raw": raw_pixels}, bank_as="bank")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fewer_queries_than_ranks(world_size: int, tmp_path: Path) -> None:
    for part, count in {"train": 12, "test": 1}.items():
        for name, color in {"red": (200, 30, 30), "green": (30, 200, 30)}.items():
            if part == "test" and name == "green":
                continue
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
                pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
        build_manifest(tmp_path / part, labels="folders").save(tmp_path / f"{part}.manifest")
    results = run_ranks(world_size, measure_one, str(tmp_path))
    assert all(result == results[0] for result in results)
    assert results[0].accuracies["raw"] == Accuracy(
        top1=1, top5=1, balanced=1, queries=1, without_neighbor=0, k=3
    )
    names = {"raw", "network", "bank", "raw_whitened", "network_whitened"}
    assert set(results[0].accuracies) == names
    assert results[0].readout in ("plain", "whitened")
