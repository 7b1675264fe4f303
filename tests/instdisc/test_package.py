"""The package root: its version, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

import instdisc
from tests.ray_cluster import CHECKOUT

VERSION = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]


def test_version_is_that_of_the_project() -> None:
    assert instdisc.__version__ == VERSION


def test_a_checkout_that_was_never_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert instdisc._version() == VERSION


def test_the_root_imports_no_large_library() -> None:
    program = "import sys; before = set(sys.modules); import instdisc; print(*set(sys.modules) - before)"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "instdisc" in said
    tops = {name.partition(".")[0] for name in said}
    assert not tops & {"cluster", "numpy", "pipelines", "ray", "torch", "torchvision", "tyro", "zarr"}


@pytest.mark.parametrize("package", ["cluster", "instdisc", "pipelines"])
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (CHECKOUT / package / "py.typed").exists()
