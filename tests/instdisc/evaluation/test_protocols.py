"""Every protocol on a small trained run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instdisc.common.errors import ConfigError
from instdisc.evaluation import finetune, linear, page, statistics, unseen
from instdisc.evaluation.context import Evaluation
from instdisc.settings.evaluation import EvaluationConfig, QueryConfig
from tests.instdisc.program import BLUE, RED, solid

QUICK = linear.LinearConfig(max_dims=64, regularizations=(1.0, 0.1), iterations=50)


def labeled(evaluation: Evaluation) -> int:
    return int((evaluation.source.bank_labels >= 0).sum())


def test_linear_classifiers_see_colors(evaluation: Evaluation) -> None:
    """Solid colors are separable from the first layer on; a quarter of the test images is of an unknown class."""
    result = linear.run(evaluation, QUICK)
    assert list(result["stages"]) == ["conv1", "layer1", "layer2", "layer3", "features", "embeddings"]
    assert (result["train_images"], result["test_images"]) == (labeled(evaluation), 12)
    assert result["stages"]["embeddings"]["dims"] == 16
    assert result["stages"]["layer1"]["dims"] == 64
    assert result["stages"]["conv1"]["probe"]["top1"] == result["stages"]["conv1"]["svm"]["top1"] == 0.75
    assert result["summary"]["svm of conv1, top-1"] == 0.75
    json.dumps(result)


def test_fewer_images_for_linear_classifiers(evaluation: Evaluation) -> None:
    assert linear.run(evaluation, replace(QUICK, max_images=15))["train_images"] == 15


def test_fine_tuning_learns_colors(evaluation: Evaluation) -> None:
    config = finetune.FinetuneConfig(fractions=(0.1, 1.0), epochs=1, batch_size=12, min_steps=30, rate=0.1)
    result = finetune.run(evaluation, config)
    assert [each["images"] for each in result["fractions"]] == [3, labeled(evaluation)]
    for start in ("trained", "scratch"):
        assert result["fractions"][1][start]["top1"] >= 0.5
        assert result["fractions"][1][start]["top5"] == 0.75
    assert "10% of the labels, from the run, top-1" in result["summary"]
    json.dumps(result)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"weight_decay": -1.0}, {"rate": math.inf}, {"batch_size": 1}]
)
def test_fine_tuning_refuses_settings_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        finetune.FinetuneConfig(**wrong)


def test_fine_tuning_starts_where_it_says(evaluation: Evaluation) -> None:
    backbone = evaluation.source.backbone
    trained, scratch = (
        finetune.new_classifier(
            evaluation.source.network, backbone, 32, 3, trained=start, seed=0
        ).state_dict()
        for start in (True, False)
    )
    run = evaluation.source.network.backbone.state_dict()
    assert trained["fc.weight"].shape == scratch["fc.weight"].shape == (3, 64)
    for name in run:
        if not name.startswith("fc."):
            assert torch.equal(trained[name], run[name])
    assert not torch.equal(scratch["conv1.weight"], run["conv1.weight"])


def test_retrieval_among_held_out_classes(evaluation: Evaluation, caplog: pytest.LogCaptureFixture) -> None:
    result = unseen.run(evaluation, unseen.UnseenConfig(classes="second-half", ranks=(1, 2, 4)))
    assert result["classes"] == ["pewter", "red"]
    assert result["classes_seen_in_training"] == ["red"]
    assert "1 of the 2 held-out classes are among the training images, e.g. red" in caplog.text
    assert result["images"] == 6
    assert list(result["recall"]) == ["1", "2", "4"]
    assert result["recall"]["4"] == 1  # of five others, two are of the class


def test_retrieval_among_images_of_other_classes(evaluation: Evaluation, tmp_path: Path) -> None:
    """Images with no class of the bank, which kNN could not use."""
    solid(tmp_path / "other", {"plum": RED, "rose": BLUE}, 4)
    result = unseen.run(evaluation, unseen.UnseenConfig(path=str(tmp_path / "other"), ranks=(1,)))
    assert (result["images"], result["classes_seen_in_training"]) == (8, [])
    assert result["recall"]["1"] == 1


def test_nothing_left_to_retrieve_among(evaluation: Evaluation, tmp_path: Path) -> None:
    """By default only what training had no image of, which is pewter alone."""
    with pytest.raises(ConfigError, match=r"1 of the 4 classes .* --data\.classes first-half"):
        unseen.run(evaluation, unseen.UnseenConfig())
    (tmp_path / "one").write_text("red\n")
    with pytest.raises(ConfigError, match=r"1 of the 4 classes .* --unseen\.classes"):
        unseen.run(evaluation, unseen.UnseenConfig(classes=str(tmp_path / "one")))


def test_statistics_of_a_run(evaluation: Evaluation, tmp_path: Path) -> None:
    train, names = evaluation.source.train, evaluation.source.class_names
    rows = [f"{train.keys[row]},kind,{names[label]}" for row, label in enumerate(train.labels) if label >= 0]
    (tmp_path / "kinds.csv").write_text("\n".join(["key,attribute,value", *rows, "gone,kind,none"]))
    result = statistics.run(
        evaluation, statistics.StatisticsConfig(bins=20, attributes=tmp_path / "kinds.csv")
    )
    assert list(result["attributes"]["kind"].values()) == [
        result["pairs"][name] for name in ("images of one class", "images of two classes")
    ]
    assert (result["unknown_keys"], len(page.similarity_charts(result))) == (1, 2)
    assert result["images"] == len(evaluation.source.train)  # unlabeled ones included
    assert len(result["edges"]) == 21
    per_class = np.bincount(evaluation.source.bank_labels[evaluation.source.bank_labels >= 0])
    counts = {name: sum(each["counts"]) for name, each in result["pairs"].items()}
    assert counts == {
        "two views of an image": len(evaluation.source.train),
        "images of one class": int(sum(count * (count - 1) // 2 for count in per_class)),
        "images of two classes": int(
            math.comb(per_class.sum(), 2) - (per_class * (per_class - 1) // 2).sum()
        ),
    }
    assert 1 <= result["effective_rank"] <= 16
    # Of unit vectors: ‖x - y‖² = 2 - 2·cosine.
    assert result["alignment"] == pytest.approx(
        2 - 2 * result["pairs"]["two views of an image"]["mean"], abs=1e-4
    )
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_protocols_that_need_test_images(trained: Path, evaluation: Evaluation, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.eye(4, 16, dtype=np.float32))
    np.save(tmp_path / "labels.npy", np.arange(4) % 3)
    queries = QueryConfig(path=str(tmp_path / "vectors.npy"), labels=str(tmp_path / "labels.npy"))
    config: EvaluationConfig = replace(evaluation.config, queries=queries)
    protocols: dict[Any, Any] = {linear.run: linear.LinearConfig(), finetune.run: finetune.FinetuneConfig()}
    with Evaluation(config) as arrays:
        for run, settings in protocols.items():
            with pytest.raises(ConfigError, match=r"array: name test images with --queries\.path"):
                run(arrays, settings)
