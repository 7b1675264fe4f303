"""Recall@K and NMI against hand-computed cases and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from instdisc.common.classes import choose_classes, class_balanced_rows
from instdisc.common.errors import ConfigError
from instdisc.evaluation.unseen import cluster_nmi, recall_at
from instdisc.model.bank import random_unit_rows


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_recall_by_hand() -> None:
    # 0° (a) finds b a; 10° (b) finds a a c b; 25° (a) finds b a; 180° (b) finds c a b; 300° (c) is alone.
    rows, labels = on_circle(0, 10, 25, 180, 300), np.array([0, 1, 0, 1, 2])
    assert recall_at(rows, labels, (1, 2, 3, 4)) == {1: 0, 2: 2 / 5, 3: 3 / 5, 4: 4 / 5}


def test_recall_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instdisc.evaluation.unseen._QUERIES_AT_A_TIME", 17)
    rows, labels = random_unit_rows(0, 60, 8, seed=1).numpy(), np.arange(60) % 7
    nearest = NearestNeighbors(n_neighbors=21).fit(rows).kneighbors(rows, return_distance=False)[:, 1:]
    for k, recall in recall_at(rows, labels, (1, 2, 4, 8, 10, 20)).items():
        assert recall == pytest.approx((labels[nearest[:, :k]] == labels[:, None]).any(axis=1).mean())


def test_recall_of_too_few_images() -> None:
    with pytest.raises(ConfigError, match="more than 8 images, 5 are"):
        recall_at(on_circle(0, 1, 2, 3, 4), np.zeros(5, np.int64), (1, 8))


def test_nmi_by_hand() -> None:
    # k-means separates the two groups; one of four images lies with the other class's group.
    # I = log 2 - (3/4·h(1/3)), h in nats; both entropies: clusters (3, 1), classes (2, 2).
    rows = on_circle(0, 1, 2, 180)
    information = (
        2 / 4 * np.log((2 / 4) / (3 / 4 * 2 / 4))
        + 1 / 4 * np.log((1 / 4) / (3 / 4 * 2 / 4))
        + 1 / 4 * np.log((1 / 4) / (1 / 4 * 2 / 4))
    )
    entropies = -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4)), np.log(2)
    nmi = cluster_nmi(rows, np.array([0, 0, 1, 1]), seed=0, starts=3)
    assert nmi == pytest.approx(information / np.mean(entropies))
    assert cluster_nmi(rows, np.array([5, 5, 5, 9]), seed=0, starts=3) == pytest.approx(1)


def test_shares_of_classes_are_balanced_and_nested() -> None:
    labels = np.array([0] * 100 + [1] * 50 + [2] * 3 + [-1] * 20)
    small, large = (class_balanced_rows(labels, fraction, seed=3) for fraction in (0.04, 0.2))
    assert np.bincount(labels[small]).tolist() == [4, 2, 1]
    assert np.bincount(labels[large]).tolist() == [20, 10, 1]
    assert set(small) <= set(large)
    assert not np.array_equal(large, class_balanced_rows(labels, 0.2, seed=4))
    assert len(class_balanced_rows(labels, 1.0, seed=0)) == 153


def test_class_splits(tmp_path: Path) -> None:
    names = ["ape", "bee", "cat", "dog", "elk"]
    assert choose_classes(names, "all") == names
    assert choose_classes(names, "first-half") == ["ape", "bee"]
    assert choose_classes(names, "second-half") == ["cat", "dog", "elk"]
    file = tmp_path / "split.txt"
    file.write_text("elk\n\nape\n")
    assert choose_classes(names, str(file)) == ["elk", "ape"]
    for text, message in (("yak\nape\n", "'yak', which is not a class"), ("\n", "names no class")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            choose_classes(names, str(file))
    with pytest.raises(ConfigError, match="cannot read the classes"):
        choose_classes(names, str(tmp_path / "missing"))
