"""Runs that an earlier release began, and was stopped in the middle of, resume and are evaluated."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from instdisc import evaluate, train
from instdisc.common.errors import ConfigError
from instdisc.evaluation.source import Source
from instdisc.runs.network import load_network
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.model import BackboneConfig
from instdisc.settings.run import RunConfig
from instdisc.settings.schema import _ADDED, _RENAMED, from_json, to_json
from pipelines.manifest import Manifest

RELEASES = Path(__file__).parents[2] / "releases"
RECIPES = {"labeled": "sample", "unlabeled": "cifar10-npid"}


@pytest.fixture(params=sorted(RECIPES))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Unpacks a run of release 0.1.0 into `tmp_path`: its images, its directory and the bank that it would end with."""
    with tarfile.open(RELEASES / f"0.1.0-{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return str(request.param)


def options(tmp_path: Path) -> list[str]:
    return [
        *("--run-dir", str(tmp_path / "run"), "--data.path", str(tmp_path / "images")),
        *("--num-workers", "0", "--metrics.port", "0"),
    ]


def test_a_run_resumes_to_the_end_that_it_would_have_had(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path / "run")
    step = run.open_snapshot().step
    assert 0 < step < 20
    assert train.main([RECIPES[kind], *options(tmp_path)]) == 0
    snapshot = run.open_snapshot()
    assert snapshot.step == 20
    expected = np.load(tmp_path / "expected_embeddings.npy")
    np.testing.assert_allclose(snapshot.read("embeddings"), expected, atol=1e-3)
    assert f"step {step}" in run.journal.read_text()
    protocols = "knn,statistics" if kind == "labeled" else "statistics"
    arguments = [
        str(run.path),
        "--protocols",
        protocols,
        "--num-actors",
        "0",
        "--metrics.port",
        "0",
        "--k",
        "5",
    ]
    assert evaluate.main(arguments) == 0
    assert "mean cosine" in capsys.readouterr().out


def test_a_run_that_has_not_resumed_is_evaluated(kind: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not Manifest.load(run.manifest).upright  # that version did not turn images
    config = run.stored_config()[1]
    assert config.knn.k == 5
    assert config.training.epochs == 4
    assert load_network(run.open_snapshot()).backbone is not None


def test_images_are_turned_as_those_of_the_bank_were(kind: str, tmp_path: Path) -> None:
    """Also where the snapshot is all that there is, and after the run has resumed."""
    assert train.main([RECIPES[kind], *options(tmp_path)]) == 0
    steps = sorted((tmp_path / "run" / "snapshots").glob("step-*"))
    assert len(steps) == 2
    for step in steps:
        alone = step.rename(tmp_path / f"alone-{step.name}")
        assert not Source(str(alone)).turns_images
    new = ["--run-dir", str(tmp_path / "new"), "--training.epochs", "1", "--training.batch-size", "4"]
    small = ["--backbone.name", "resnet8", "--augmentation.image-size", "24"]
    assert train.main(["cifar10-softmax", *options(tmp_path), *new, *small]) == 0
    assert Source(str(tmp_path / "new")).turns_images


@pytest.mark.parametrize("name", ["math", "ObjectiveConfig", "dataclass", "MagicConfig"])
def test_an_objective_that_is_not_here_is_refused(kind: str, tmp_path: Path, name: str) -> None:
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"objective {name}"):
        from_json(stored | {"objective_type": name}, "config.json")


def test_a_recipe_may_change(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[kind]
    config = train.RECIPES[recipe].config
    changed = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=7.0),
        backbone=BackboneConfig(name="vgg11"),
    )
    monkeypatch.setitem(train.RECIPES, recipe, train.RECIPES[recipe]._replace(config=changed))
    assert train.parse([recipe, *options(tmp_path)])[1].backbone.name == "resnet8"
    assert train.main([recipe, *options(tmp_path)]) == 0


def test_another_recipe_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["cifar10-softmax", *options(tmp_path)]) == 2
    assert f"holds a run of recipe {RECIPES[kind]}, not cifar10-softmax" in capsys.readouterr().err


def test_every_setting_was_known_to_the_release_or_has_the_value_that_does_what_it_did(
    kind: str, tmp_path: Path
) -> None:
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    added = {name for schema in _ADDED.values() for name in schema}
    renamed = {new for schema in _RENAMED.values() for new in schema.values()}
    config = RunDirectory(tmp_path / "run").stored_config()[1]
    for group, values in config.settings().items():
        if group in stored and isinstance(values, dict):
            assert {f"{group}.{name}" for name in values.keys() - stored[group].keys()} <= added | renamed
        else:
            assert group in stored or group in added | renamed


def test_an_option_that_differs_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([RECIPES[kind], *options(tmp_path), "--training.seed", "5"]) == 2
    assert "training.seed is 0 there and 5 here" in capsys.readouterr().err


def test_a_setting_that_no_version_knows_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["bank"]["color"] = "red"
    with pytest.raises(ConfigError, match="the setting color"):
        from_json(stored, str(path))


def test_a_later_schema_is_refused(kind: str, tmp_path: Path) -> None:
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    with pytest.raises(ConfigError, match="schema 1000"):
        from_json(stored | {"schema": 1000}, "config.json")


def test_settings_are_read_as_they_were_written(kind: str, tmp_path: Path) -> None:
    recipe, config = RunDirectory(tmp_path / "run").stored_config()
    assert isinstance(config, RunConfig)
    stored = json.loads(json.dumps(to_json(config, recipe, "id")))
    assert from_json(stored, "config.json") == config
