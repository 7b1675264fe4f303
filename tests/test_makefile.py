"""The Python that make takes for the environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ray_cluster import CHECKOUT


def make(folder: Path, pythons: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """What make would run where these are all programs, which exit with these statuses."""
    for name, status in pythons.items():
        (folder / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (folder / name).chmod(0o755)
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, "--dry-run", "environment", f"VENV={folder / 'new'}"],
        cwd=CHECKOUT,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": 0, "python3.12": 0, "python3.13": 0}, "python3.13"),
        ({"python3.11": 0, "python3.12": 0, "python3.13": 1}, "python3.12"),
        ({"python3.10": 0, "python3.11": 0, "python3.14": 0}, "python3.11"),
    ],
)
def test_the_newest_that_can_make_an_environment(tmp_path: Path, pythons: dict[str, int], taken: str) -> None:
    assert make(tmp_path, pythons).stdout.startswith(f"{taken} -m venv {tmp_path / 'new'}\n")


@pytest.mark.parametrize("pythons", [{}, {"python3.12": 1}])
def test_where_none_can_one_line_says_what_to_install(tmp_path: Path, pythons: dict[str, int]) -> None:
    done = make(tmp_path, pythons)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "sudo apt-get install python3-venv" in line
