"""The training program as a fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from instdisc.train import main
from tests.instdisc.program import SMALL, Run


@pytest.fixture
def run(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run `sample` with other images; returns status, everything it said, and the run directory."""
    monkeypatch.chdir(tmp_path)

    def run(images: Path, *more: str, test: Path | None = None) -> tuple[int, str, Path]:
        where = ["--data.path", str(images), "--data.test-path", str(test), "--run-dir", "out"]
        try:
            status = main(["sample", *SMALL, *where, *more])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capfd.readouterr()
        return status, captured.out + captured.err + caplog.text, tmp_path / "out"

    return run
