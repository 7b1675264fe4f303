"""Every example runs; `three_nodes` has a test of its own in `tests/e2e`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from examples import custom_objective, embed_and_search
from instdisc.runs.run_directory import RunDirectory
from pipelines.manifest import Manifest
from tests.instdisc.objectives.objective_steps import batch, step, whole_batch
from tests.instdisc.program import picture
from tests.processes import run_ranks
from tests.ray_cluster import CHECKOUT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the custom objective on the 500 cats of the sample."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "classes.txt").write_text("cat\n")
    where = ["--data.root", folder, "--data.classes", folder / "classes.txt", "--run-dir", folder / "run"]
    how = ["--num-workers", "0", "--training.epochs", "1", "--knn.no-baselines", "--metrics.port", "0"]
    assert custom_objective.main([*map(str, where), *how]) == 0
    return folder / "run"


def test_the_custom_objective_is_trained(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["recipe"], summary["num_instances"], summary["steps"]) == ("decoupled", 500, 3)
    assert RunDirectory(trained).settings()["objective"] == {"temperature": 0.1}


def test_the_custom_objective_resumes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = (trained / "summary.json").read_text()
    options = ["--run-dir", str(trained), "--data.root", str(trained.parent), "--metrics.port", "0"]
    assert custom_objective.main(options) == 0, capsys.readouterr().err
    assert (trained / "summary.json").read_text() == summary


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_custom_objective_has_the_gradient_of_its_formula(world_size: int) -> None:
    config = custom_objective.DecoupledConfig(temperature=0.2)
    losses, gradients = whole_batch(run_ranks(world_size, step, config, "random", 53, 16), views=2)
    embeddings, ids = batch("random", 53, 16, views=2)
    f, present = embeddings.double().requires_grad_(), ids >= 0
    expected = torch.zeros(2, len(ids), dtype=torch.float64)
    for i in torch.nonzero(present).flatten().tolist():
        others = f[:, present & (torch.arange(len(ids)) != i)].flatten(0, 1)
        for view in (0, 1):
            attraction = f[view, i] @ f[1 - view, i]
            expected[view, i] = torch.logsumexp(others @ f[view, i] / 0.2, dim=0) - attraction / 0.2
    expected.sum().backward()
    assert f.grad is not None
    torch.testing.assert_close(losses.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients.double(), f.grad, atol=1e-5, rtol=1e-5)


def test_images_are_embedded_and_their_nearest_images_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(tmp_path / "query.png")
    embed_and_search.main(str(trained), str(tmp_path / "query.png"))
    query, *found = capsys.readouterr().out.splitlines()
    assert query == str(tmp_path / "query.png")
    keys, scores = list(Manifest.load(trained / "manifest").keys), []
    for line in found:
        score, key, row = re.fullmatch(r" +(\S+)  (\S+) \(row (\d+)\)", line).groups()
        assert keys[int(row)] == key
        scores.append(float(score))
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_the_python_of_the_readme_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sample").symlink_to(trained)
    for number, name in enumerate(("cat.jpg", "dog.jpg")):
        picture(number).save(name)
    (program,) = re.findall(
        r"^```python\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    exec(program, {})
    assert "[" in capsys.readouterr().out  # scores and rows of the nearest images
