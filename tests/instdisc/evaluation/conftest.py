"""A small trained run with labeled test images, opened as the protocols get it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.settings import ActorsConfig
from instdisc.evaluation.context import Evaluation
from instdisc.settings.evaluation import EvaluationConfig
from pipelines.loader import LoaderConfig
from tests.instdisc.program import solid
from tests.instdisc.test_evaluate import CLASSES, train_small


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices take many times as long when threads wait for one another on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of solid colors; the test images have a fourth, pewter."""
    folder = tmp_path_factory.mktemp("trained")
    return train_small(folder, solid(folder / "test", {**CLASSES, "pewter": (120, 120, 120)}, 3))


@pytest.fixture
def evaluation(trained: Path, tmp_path: Path) -> Iterator[Evaluation]:
    """In this process, without actors."""
    config = EvaluationConfig(
        source=str(trained),
        actors=ActorsConfig(num_actors=0),
        loader=LoaderConfig(backend="host", threads=1),
        output=tmp_path / "out",
    )
    with Evaluation(config) as evaluation:
        yield evaluation
