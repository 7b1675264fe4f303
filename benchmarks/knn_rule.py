"""The rule for k, and leave-one-out, where the answer is known: no information, and clusters. Prints Markdown.

    python benchmarks/knn_rule.py [--draws 100] > benchmarks/results/DATE-knn-rule.md

Without information the accuracy should be chance: what the same answers reach against the labels in any other order.
`as usual` is k = 200, or all rows, with the query alone left out, as most public code has it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from instdisc.model.voters import Voters, choose_voters
from instdisc.model.votes import weighted_votes

DIM, TEMPERATURE = 32, 0.07
COSINES = (0.0, 0.9, 0.99)
TRIED = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200)
Labels = npt.NDArray[np.int64]


def labels_of(n: int, classes: int, *, balanced: bool) -> Labels:
    """Classes of n rows: as many of each, or 1/1, 1/2, 1/3, … of the first."""
    shares = np.ones(classes) if balanced else 1 / np.arange(1, classes + 1)
    sizes = np.maximum(np.floor(n * shares / shares.sum()).astype(np.int64), 1)
    for number in itertools.cycle(range(classes)):
        if sizes.sum() == n:
            return np.repeat(np.arange(classes), sizes)
        sizes[number] += np.sign(n - sizes.sum()) * (sizes[number] > 1 or sizes.sum() < n)
    raise AssertionError


def in_a_cone(
    features: npt.NDArray[np.float64], cosine: float, axis: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Unit rows whose mean cosine is about `cosine` if they have nothing to do with each other."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    turned = np.sqrt(1 - cosine) * unit + np.sqrt(cosine) * axis / np.linalg.norm(axis)
    return torch.from_numpy(turned / np.linalg.norm(turned, axis=1, keepdims=True)).float()


def answers(voters: Voters, rows: torch.Tensor, queries: torch.Tensor, k: int) -> Labels:
    """The class that the vote of k neighbors names for each query; -1 without a neighbor."""
    scores, found = (queries @ rows.T).topk(voters.searched(k), dim=1)
    asking = torch.arange(len(queries)) if voters.leave_one_out else None
    scores, found = voters.voting(scores, found, asking, k)
    return named(scores, voters.labels_of(found), len(voters.sizes))


def answers_as_usual(voters: Voters, rows: torch.Tensor, queries: torch.Tensor) -> Labels:
    """The same with k = 200, or all rows, and the query alone left out."""
    similarities = queries @ rows.T
    if voters.leave_one_out:
        similarities.fill_diagonal_(-torch.inf)
    scores, found = similarities.topk(min(200, len(rows)), dim=1)
    labels = voters.labels_of(found).masked_fill(scores == -torch.inf, -1)
    return named(scores, labels, len(voters.sizes))


def named(scores: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Labels:
    """The class with the most votes."""
    votes, best = weighted_votes(scores, labels, num_classes, temperature=TEMPERATURE).max(dim=1)
    return np.asarray(best.masked_fill(votes <= 0, -1))


def chance(found: Labels, truth: Labels) -> float:
    """Mean accuracy of the answers over all orders of the labels."""
    shares = [
        np.bincount(each[each >= 0], minlength=int(truth.max()) + 1) / len(truth) for each in (found, truth)
    ]
    return float(shares[0] @ shares[1])


def draws_of(n: int, draws: int) -> int:
    """More draws of few rows, whose accuracies vary more."""
    return max(draws // 4, min(4 * draws, draws * 500 // n), 1)


def without_information(draws: int) -> Iterator[str]:
    """Accuracy less chance, in points, the worst of the three cones."""
    yield "| rows | classes | queries | k | as usual, the three cones | by the rule | chance |"
    yield "|---|---|---|---|---|---|---|"
    generator = np.random.default_rng(0)
    for n, classes, balanced, leave_one_out in itertools.product(
        (24, 96, 500, 2000), (2, 5, 20), (True, False), (True, False)
    ):
        labels = labels_of(n, classes, balanced=balanced)
        voters = choose_voters(labels, leave_one_out=leave_one_out)
        k, usual, ruled, by_chance = voters.neighbors(), [], [], []
        for cosine in COSINES:
            found = []
            for _ in range(draws_of(n, draws)):
                axis = generator.standard_normal(DIM)
                rows = in_a_cone(generator.standard_normal((n, DIM)), cosine, axis)
                queries = rows
                if not leave_one_out:
                    queries = in_a_cone(generator.standard_normal((n, DIM)), cosine, axis)
                both = answers_as_usual(voters, rows, queries), answers(voters, rows, queries, k)
                found.append(
                    [(each == labels).mean() for each in both] + [chance(each, labels) for each in both]
                )
            means = 100 * np.mean(found, axis=0)
            usual.append(f"{means[0] - means[2]:+.1f}")
            ruled.append(f"{means[1] - means[3]:+.1f}")
            by_chance.append(f"{means[3]:.1f}")
        kind = ("balanced" if balanced else "unbalanced") + f" {classes}"
        queries_are = "leave-one-out" if leave_one_out else "test set"
        figures = " | ".join(", ".join(each) for each in (usual, ruled, by_chance))
        yield f"| {n} | {kind} | {queries_are} | {k} | {figures} |"


def clusters(draws: int) -> Iterator[str]:
    """Accuracy on clusters by the rule and by the best k."""
    yield "| rows | classes | mean cosine | k | by the rule | best of 12 k | k = 200 |"
    yield "|---|---|---|---|---|---|---|"
    generator = np.random.default_rng(1)
    for n, classes, balanced, cosine in itertools.product(
        (24, 96, 500, 2000), (2, 5, 20), (True, False), (0.0, 0.99)
    ):
        labels = labels_of(n, classes, balanced=balanced)
        voters = choose_voters(labels, leave_one_out=True)
        tried, found = (*TRIED, voters.neighbors()), []
        for _ in range(draws_of(n, draws)):
            centers = generator.standard_normal((classes, DIM))
            features = centers[labels] + 0.7 * generator.standard_normal((n, DIM))
            rows = in_a_cone(features, cosine, generator.standard_normal(DIM))
            found.append([(answers(voters, rows, rows, k) == labels).mean() for k in tried])
        means = 100 * np.mean(found, axis=0)
        best = int(means[:-1].argmax())
        kind = ("balanced" if balanced else "unbalanced") + f" {classes}"
        yield (
            f"| {n} | {kind} | {cosine} | {tried[-1]} | {means[-1]:.1f} | {means[best]:.1f} (k = {tried[best]}) | "
            f"{means[-2]:.1f} |"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--draws", type=int, default=100, help="of 500 rows; of fewer rows up to 4 times as many"
    )
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    print("## Features without information: accuracy less chance, in points, for mean cosines 0, 0.9, 0.99\n")
    for line in without_information(draws):
        print(line, flush=True)
    print("\n## Clusters, leave-one-out: accuracy in percent\n")
    for line in clusters(max(1, draws // 10)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
