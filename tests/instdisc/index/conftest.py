"""A small trained run, and the program that makes and changes indexes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import lease
from cluster.collection import Collection, open_collection
from instdisc.embed import main
from tests.instdisc.program import solid
from tests.instdisc.test_evaluate import CLASSES, train_small

Embed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 images of three colors, with test images."""
    folder = tmp_path_factory.mktemp("trained")
    return train_small(folder, solid(folder / "test", CLASSES, 2))


@pytest.fixture
def images(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's images, to change."""
    return Path(shutil.copytree(trained.parent / "train", tmp_path / "images"))


@pytest.fixture
def embed(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Embed:
    """Run the program on `tmp_path/index`, in this process; returns status and everything it said."""
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)

    def embed(*arguments: Path | str, output: Path | str = tmp_path / "index") -> tuple[int, str]:
        more = ["--loader.threads", "1", "--loader.backend", "host"]
        if "--num-actors" not in arguments:
            more += ["--num-actors", "0"]
        try:
            status = main([*map(str, arguments), "--output", str(output), *more])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capfd.readouterr()
        said = captured.out + captured.err + caplog.text
        caplog.clear()
        return status, said

    return embed


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], Collection]:
    """Open `tmp_path/index`."""
    return lambda: open_collection(tmp_path / "index")
