"""Weighted kNN against a float64 transcription, whole and in shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.exchange import Exchange
from cluster.group import Worker
from cluster.partition import Partition
from instdisc.model.bank import random_unit_rows
from instdisc.model.votes import shard_top_k, weighted_votes
from instdisc.settings.model import BackboneConfig
from instdisc.settings.run import DataConfig, KnnMonitorConfig, RunConfig, TrainingConfig
from instdisc.training.monitor import KnnMonitor, knn_top1, raw_pixels
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


def sharded(rank: int, world_size: int, leave_one_out: bool, k: int) -> float:
    rows, labels = random_unit_rows(0, 90, 8, seed=2), torch.arange(90) % 5
    labels[7] = -1
    partition = Partition(90, world_size)
    mine = slice(partition.start(rank), partition.stop(rank))
    if leave_one_out:
        chosen = torch.arange(0, 90, 2)[rank::world_size]
        queries, own_rows = (rows[chosen], labels[chosen]), chosen
    else:
        chosen = torch.arange(31)[rank::world_size]
        queries, own_rows = (random_unit_rows(0, 31, 8, seed=5)[chosen], chosen % 6), None
    config = dataclasses.replace(KnnMonitorConfig(), k=k)
    return knn_top1(
        Exchange(rank, world_size), partition, config, queries, own_rows, (rows[mine], labels[mine]), 5
    )


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("k", [1, 12, 500])
def test_shards_classify_as_the_whole(leave_one_out: bool, k: int) -> None:
    rows, labels = random_unit_rows(0, 90, 8, seed=2).double().numpy(), np.arange(90) % 5
    voters = np.ones(90, dtype=bool)
    voters[7] = False
    correct = []
    for number in range(0, 90, 2) if leave_one_out else range(31):
        query = rows[number] if leave_one_out else random_unit_rows(0, 31, 8, seed=5)[number].double().numpy()
        others = np.arange(90) != (number if leave_one_out else -1)
        nearest = np.argsort(-np.where(others, rows @ query, -np.inf), kind="stable")[: min(k, others.sum())]
        nearest = nearest[voters[nearest]]
        votes = np.zeros(5)
        np.add.at(votes, labels[nearest], np.exp(rows[nearest] @ query / 0.07))
        correct.append(votes.argmax() == number % (5 if leave_one_out else 6))
    for world_size in (1, 2, 3):
        results = run_ranks(world_size, sharded, leave_one_out, k)
        assert results == pytest.approx([np.mean(correct)] * world_size)


def measure_one(rank: int, world_size: int, directory: str) -> dict[str, float | None]:
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
        for name, colour in {"red": (200, 30, 30), "green": (30, 200, 30)}.items():
            if part == "test" and name == "green":
                continue
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
        build_manifest(tmp_path / part, labels="folders").save(tmp_path / f"{part}.manifest")
    results = run_ranks(world_size, measure_one, str(tmp_path))
    assert all(result == results[0] for result in results)
    assert results[0]["raw"] == 1.0
    assert set(results[0]) == {"raw", "network", "bank"}
