"""Queries compared with other labeled images than those that were trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from instdisc.common.errors import ConfigError
from instdisc.evaluation import finetune, knn, linear, page
from instdisc.evaluation.context import Evaluation
from instdisc.settings.evaluation import KnnConfig, PageConfig, QueryConfig, ReferenceConfig
from pipelines.errors import DataError
from tests.instdisc.program import BLUE, RED, solid, write_pictures
from tests.instdisc.test_evaluate import train_small
from tests.reference import weighted_knn

OTHER = {"plum": (90, 20, 110), "rose": (230, 60, 110), "sky": (110, 180, 230), "moss": (60, 90, 40)}
Open = Callable[..., Evaluation]


@pytest.fixture
def compared(evaluation: Evaluation, tmp_path: Path) -> Iterator[Open]:
    """Opens the run with other labeled images, of which there are eight a class, and three a class as queries."""
    solid(tmp_path / "reference", OTHER, 8)
    solid(tmp_path / "asked", OTHER, 3)

    def opened(reference: Path | None = None, queries: Path | None = tmp_path / "asked") -> Evaluation:
        return Evaluation(
            replace(
                evaluation.config,
                reference=ReferenceConfig(path=str(reference or tmp_path / "reference")),
                queries=QueryConfig(path=None if queries is None else str(queries)),
            )
        )

    return opened


def float64(evaluation: Evaluation, manifest: object) -> NDArray[np.float64]:
    rows = evaluation.compute(manifest).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_nearest_reference_images_vote(compared: Open) -> None:
    with compared() as evaluation:
        result = knn.run(evaluation, KnnConfig(k=5))
        images, asked = evaluation.reference.images, evaluation.queries.manifest
        assert asked is not None
        rows, labels = float64(evaluation, images), np.asarray(images.labels)
        votes = [
            weighted_knn(query, rows, labels, len(OTHER), k=5, temperature=0.07)
            for query in float64(evaluation, asked)
        ]
    assert (result["rows"], result["queries"], result["bank"]) == (32, 12, "reference")
    assert result["unknown_classes"] == {}
    found = np.argmax(votes, axis=1) == np.asarray(asked.labels)
    assert result["accuracies"]["k5"]["top1"] == pytest.approx(found.mean())
    assert result["whitened"] is not None


def test_reference_images_classify_each_other(tmp_path: Path, compared: Open) -> None:
    """A run without labels and without test images has nothing else to be measured by."""
    run = train_small(tmp_path / "unlabeled", None, images=write_pictures(tmp_path / "pictures", 24))
    with compared(queries=None) as evaluation:
        config = replace(evaluation.config, source=str(run), output=tmp_path / "second")
    with Evaluation(config) as evaluation:
        result = knn.run(evaluation, KnnConfig())
        assert evaluation.queries.kind == "leave-one-out"
        assert page.run(evaluation, PageConfig(examples=2))
    assert (result["rows"], result["queries"]) == (32, 32)
    said = (tmp_path / "second" / "index.html").read_text()
    assert "Nearest rows of the best queries" in said
    assert "plum" in said


def test_classifiers_are_trained_on_the_reference(compared: Open) -> None:
    with compared() as evaluation:
        quick = linear.LinearConfig(max_dims=64, regularizations=(1.0, 0.1), iterations=50)
        probed = linear.run(evaluation, quick)
        tuned = finetune.run(
            evaluation, finetune.FinetuneConfig(fractions=(1.0,), epochs=1, batch_size=16, min_steps=5)
        )
    assert (probed["train_images"], probed["test_images"]) == (32, 12)
    assert probed["stages"]["conv1"]["probe"]["top1"] == 1  # colors are separable
    assert tuned["fractions"][0]["images"] == 32


def test_a_reference_that_cannot_be_used(compared: Open, tmp_path: Path) -> None:
    solid(tmp_path / "others", {"navy": RED, "lime": BLUE}, 2)
    with compared(queries=tmp_path / "others") as evaluation, pytest.raises(ConfigError, match=r"navy|lime"):
        knn.run(evaluation, KnnConfig())
    pictures = write_pictures(tmp_path / "pictures", 4)
    with (
        compared(pictures) as evaluation,
        pytest.raises(ConfigError, match=r"--reference\.path: no image of"),
    ):
        knn.run(evaluation, KnnConfig())
    with (
        compared(tmp_path / "gone") as evaluation,
        pytest.raises(DataError, match=r"--reference\.path: nothing"),
    ):
        knn.run(evaluation, KnnConfig())
