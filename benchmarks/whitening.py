"""kNN accuracy against the power of the whitening, on the sample, over several seeds. Prints Markdown.

    python benchmarks/whitening.py [--epochs 10] [--seeds 3] [--recipe sample]

The power 0 only centers, 1 whitens fully. k and τ are those of training; labels take part in the accuracy alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cluster.settings import ActorsConfig, MetricsConfig
from instdisc.evaluation.context import Evaluation
from instdisc.model import whitening
from instdisc.model.features import mirrored_features
from instdisc.model.label_free import raw_pixels
from instdisc.model.voters import Voters
from instdisc.model.votes import Accuracy, count_hits, shard_top_k
from instdisc.settings.evaluation import EvaluationConfig
from instdisc.train import main as train
from instdisc.training.monitor import coarse_pixels

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
Tables = tuple[torch.Tensor, torch.Tensor]


def pixels(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Raw pixels, whatever the network."""
    return raw_pixels(images)


def tables(evaluation: Evaluation) -> Iterator[tuple[str, Tables, Tables]]:
    """What is compared: its name, rows and queries as they are, and those that are whitened."""
    train_images, test_images = evaluation.source.train, evaluation.queries.manifest
    assert test_images is not None
    embeddings = tuple(torch.from_numpy(evaluation.compute(each)) for each in (train_images, test_images))
    yield "trained", embeddings, embeddings
    features = tuple(
        torch.from_numpy(evaluation.compute(each, mirrored_features)) for each in (train_images, test_images)
    )
    yield "features of the last stage", tuple(F.normalize(each, dim=1) for each in features), features
    raw = tuple(torch.from_numpy(evaluation.compute(each, pixels)) for each in (train_images, test_images))
    yield "raw pixels", raw, (coarse_pixels(raw[0]), coarse_pixels(raw[1]))


def accuracy(voters: Voters, rows_and_queries: Tables, truth: torch.Tensor) -> float:
    """Top-1 in percent."""
    rows, queries = rows_and_queries
    k, num_classes = voters.neighbors(), len(voters.sizes)
    scores, found = shard_top_k(queries, rows, k)
    counts = count_hits(scores, voters.labels_of(found), truth, num_classes, num_classes, temperature=0.07)
    result = Accuracy.of(counts, k)
    assert result is not None
    return 100 * result.top1


def measure(recipe: str, epochs: int, seed: int) -> dict[str, list[float]]:
    """Accuracies of one run: plain, then by power."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--num-workers", "0", "--training.epochs", str(epochs), "--training.seed", str(seed)]
        options += ["--knn.every", "0", "--knn.no-baselines", "--metrics.port", "0"]
        assert train([recipe, *options, "--run-dir", folder]) == 0
        config = EvaluationConfig(
            source=folder,
            recompute=True,
            actors=ActorsConfig(num_actors=0),
            metrics=MetricsConfig(port=None),
            output=Path(folder) / "evaluation",
        )
        found = {}
        with Evaluation(config) as evaluation:
            truth = torch.from_numpy(evaluation.queries.labels)
            for name, plain, (rows, queries) in tables(evaluation):
                fits = [whitening.fit(rows, power=power) for power in POWERS]
                found[name] = [accuracy(evaluation.voters, plain, truth)] + [
                    accuracy(evaluation.voters, (fitted(rows), fitted(queries)), truth) for fitted in fits
                ]
        return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="sample")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runs = [measure(arguments.recipe, arguments.epochs, seed) for seed in range(arguments.seeds)]
    print(
        f"\n`{arguments.recipe}`, {arguments.epochs} epochs, mean and standard deviation over {len(runs)} seeds\n"
    )
    print("| kNN top-1 | plain | " + " | ".join(f"power {power:g}" for power in POWERS) + " |")
    print("|---" * (2 + len(POWERS)) + "|")
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        cells = (
            f"{mean:.1f} ± {std:.1f}"
            for mean, std in zip(values.mean(axis=0), values.std(axis=0), strict=True)
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
