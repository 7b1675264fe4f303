"""Who votes in weighted kNN: the rule for k on data without information and on clusters, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from instdisc.model.voters import Voters, choose_voters
from instdisc.model.votes import weighted_votes
from tests import reference

DIM = 16


def sizes_of(n: int, classes: int, *, balanced: bool) -> NDArray[np.int64]:
    """n rows over classes, the same number of each or about half as many of each as of the one before, at least 2."""
    shares = np.ones(classes) if balanced else 0.5 ** np.arange(classes)
    sizes = np.maximum(np.floor(n * shares / shares.sum()), 1 if balanced else 2).astype(np.int64)
    sizes[0] += n - sizes.sum()
    return sizes


def in_a_cone(features: NDArray[np.float64], cosine: float, axis: NDArray[np.float64]) -> torch.Tensor:
    """The rows, unit, turned towards an axis so far that the mean cosine of two unrelated ones is `cosine`."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    turned = np.sqrt(1 - cosine) * unit + np.sqrt(cosine) * axis / np.linalg.norm(axis)
    return torch.from_numpy(turned / np.linalg.norm(turned, axis=1, keepdims=True)).float()


def classified(
    voters: Voters, rows: torch.Tensor, queries: torch.Tensor, truth: NDArray[np.int64], k: int
) -> tuple[float, float]:
    """Accuracy, and what the same answers would reach against truths in any other order."""
    scores, found = (queries @ rows.T).topk(voters.searched(k), dim=1)
    asking = torch.arange(len(queries)) if voters.leave_one_out else None
    scores, found = voters.voting(scores, found, asking, k)
    votes = weighted_votes(scores, voters.labels_of(found), len(voters.sizes), temperature=0.07)
    named = votes.argmax(dim=1).numpy()
    shares = (np.bincount(each, minlength=votes.shape[1]) / len(truth) for each in (named, truth))
    return float((named == truth).mean()), float(np.prod(list(shares), axis=0).sum())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices take many times as long when threads wait for one another on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize(
    ("n", "classes", "balanced"),
    [(24, 2, True), (24, 2, False), (40, 20, True), (96, 2, True), (200, 5, False)],
)
@pytest.mark.parametrize("cosine", [0, 0.9, 0.99])
def test_features_without_information_are_at_chance(
    n: int, classes: int, balanced: bool, cosine: float, leave_one_out: bool
) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), sizes_of(n, classes, balanced=balanced))
    voters = choose_voters(labels, leave_one_out=leave_one_out)
    found = []
    for _ in range(12_000 // n):
        axis = generator.standard_normal(DIM)
        rows = in_a_cone(generator.standard_normal((n, DIM)), cosine, axis)
        queries = rows if leave_one_out else in_a_cone(generator.standard_normal((n, DIM)), cosine, axis)
        found.append(classified(voters, rows, queries, labels, voters.neighbors()))
    accuracy, chance = np.mean(found, axis=0)
    assert accuracy == pytest.approx(chance, abs=0.02)
    if balanced:
        assert accuracy == pytest.approx(1 / classes, abs=0.02)


@pytest.mark.parametrize(
    ("n", "classes", "balanced"), [(24, 2, True), (40, 20, True), (60, 5, False), (300, 5, True)]
)
@pytest.mark.parametrize("cosine", [0, 0.99])
def test_clusters_are_found_as_by_the_best_k(n: int, classes: int, balanced: bool, cosine: float) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), sizes_of(n, classes, balanced=balanced))
    voters = choose_voters(labels, leave_one_out=True)
    tried = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200, voters.neighbors()]
    found = []
    for _ in range(10):
        centers, noise = generator.standard_normal((classes, DIM)), generator.standard_normal((n, DIM))
        rows = in_a_cone(centers[labels] + 0.6 * noise, cosine, generator.standard_normal(DIM))
        found.append([classified(voters, rows, rows, labels, k)[0] for k in tried])
    accuracies = np.mean(found, axis=0)
    assert accuracies.max() > 0.9
    assert accuracies[-1] >= accuracies.max() - 0.02


@pytest.mark.parametrize(
    ("sizes", "leave_one_out", "k"),
    [
        ([5000] * 10, False, 200),  # CIFAR-10
        ([500] * 100, True, 200),  # CIFAR-100, and the sample with ten classes
        ([1300] * 900 + [732] * 100, False, 200),  # ImageNet
        ([134, 500], False, 200),
        ([48, 48], True, 70),
        ([48, 48], False, 72),
        ([2, 2, 2], True, 1),
        ([1, 1, 1], True, 1),
        ([1], False, 1),
        ([1000, 1000, 1, 1], True, 200),  # two rows in a thousand
        ([1000, 30], True, 43),
    ],
)
def test_k_by_the_sizes_of_the_classes(sizes: list[int], leave_one_out: bool, k: int) -> None:
    voters = choose_voters(np.repeat(np.arange(len(sizes)), sizes), leave_one_out=leave_one_out)
    assert voters.neighbors() == k
    assert voters.neighbors(7) == min(7, sum(sizes))


def test_one_row_of_every_class_is_left_out() -> None:
    labels = np.array([0, 0, 0, -1, 1, 1, 2, 0, 1, -1, 1, 0, 0])
    voters = choose_voters(labels, leave_one_out=True)
    assert voters.rows.tolist() == np.flatnonzero(labels >= 0).tolist()
    for query in range(len(voters)):
        kept = reference.without_one_of_every_class(voters.labels, voters.turns, query)
        assert np.bincount(voters.labels[kept], minlength=3).tolist() == [5, 3, 0]
        scores = torch.linspace(1, 0, len(voters))[None]
        places = torch.arange(len(voters))[None]
        scores, found = voters.voting(scores, places, torch.tensor([query]), len(voters))
        assert found[0, : len(kept)].tolist() == kept.tolist()
        assert (found[0, len(kept) :] == -1).all()
        assert (scores[0, len(kept) :] == -torch.inf).all()


def test_a_sample_is_always_the_same_and_of_labeled_rows() -> None:
    labels = np.tile([0, -1, 1, 2, -1], 100)
    sample = choose_voters(labels, leave_one_out=False, max_rows=50)
    assert len(sample) == 50
    assert (labels[sample.rows] == sample.labels).all()
    assert (sample.labels >= 0).all()
    assert (np.diff(sample.rows) > 0).all()
    again = choose_voters(labels, leave_one_out=False, max_rows=50)
    assert (again.rows == sample.rows).all()
    assert len(choose_voters(labels, leave_one_out=False, max_rows=300)) == 300
    assert len(choose_voters(labels, leave_one_out=False)) == 300
