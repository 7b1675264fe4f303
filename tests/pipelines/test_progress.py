import os
import pty
import sys

import pytest

from pipelines import bars, scan


def test_a_log_file_gets_whole_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "_LINE_S", 0.0)
    with scan.progress_bar(True, 2000, " images") as bar:
        bar.update(500)
        bar.update(1500)
    shown = capfd.readouterr().err
    assert "\r" not in shown
    first, last = shown.splitlines()[-2:]
    assert "500/2.00k" in first
    assert "2.00k/2.00k" in last


def test_a_log_file_gets_nothing_of_quick_work(capfd: pytest.CaptureFixture[str]) -> None:
    with scan.progress_bar(True, 2000, " images") as bar:
        for _ in range(2000):
            bar.update()
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, end = pty.openpty()
    with os.fdopen(end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with scan.progress_bar(True, 2000, " images") as bar:
            bar.delay = 0.0
            bar.update(2000)
            bar.refresh()
        assert b"\r" in os.read(terminal, 4096)
    os.close(terminal)
