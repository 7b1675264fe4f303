"""What the test suite says of itself: what was not run, and a quick test that uses Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray_cluster import CHECKOUT


def run_tests(folder: Path, source: str, *options: str) -> list[str]:
    """Lines that pytest prints of a test file."""
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--rootdir={folder}", *options]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "markers=ray", str(folder)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_last_line_names_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    source = """
import pytest
from tests.debian import need

@pytest.mark.parametrize("number", range(2))
def test_of_a_browser(number): need("no-browser", "none-either", package="chromium")
def test_of_a_server(): need("no-server", package="prometheus")
def test_of_python(): need("sh", package="dash")
def test_of_a_gpu(): pytest.skip("needs a GPU")
"""
    *_, last = run_tests(tmp_path, source)
    assert last == (
        "not run: 2 for want of chromium, 1 for want of prometheus; install with: "
        "sudo apt-get install --no-install-recommends chromium prometheus"
    )
    *_, last = run_tests(tmp_path, "def test_it(): pass")
    assert last.startswith("1 passed")
    monkeypatch.setenv("CI", "true")
    *said, last = run_tests(tmp_path, source)
    assert any("needs no-server of the Debian package prometheus" in line for line in said)
    assert last.startswith("3 failed, 1 passed, 1 skipped")


@pytest.mark.slow
def test_a_quick_test_that_uses_ray_fails(tmp_path: Path) -> None:
    source = """
import subprocess, sys
import pytest

@pytest.mark.ray
def test_marked(): assert False
def test_unmarked():
    import ray
def test_unmarked_process(): subprocess.run([sys.executable, "-c", "import ray"], check=True)
def test_without(): pass
"""
    said = run_tests(tmp_path, source, "--quick")
    reason = "ImportError: a quick test imports Ray: mark the test with pytest.mark.ray"
    assert [line.removeprefix("E").strip() for line in said].count(reason) == 2
    assert said[-1].startswith("2 failed, 1 passed, 1 deselected")
