"""Programs that tests run for real, and the Debian packages that bring them."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable

import pytest


def need(*names: str, package: str) -> str:
    """Return the path of the first of these programs that is installed; skip the test if none is, but not in CI."""
    found = next(filter(None, map(shutil.which, names)), None)
    reason = f"needs {names[0]} of the Debian package {package}"
    if found is None and os.environ.get("CI"):
        pytest.fail(reason)
    if found is None:
        pytest.skip(reason)
    return found


def not_run(reasons: Iterable[str]) -> str:
    """One line on the tests that lacked a package, and the command that installs it; empty if none did.

    Args:
        reasons: Why each skipped test was skipped.
    """
    found = [re.search(r"of the Debian package (\S+)$", reason) for reason in reasons]
    lacking = Counter(match[1] for match in found if match is not None)
    if not lacking:
        return ""
    counts = ", ".join(f"{count} for want of {package}" for package, count in sorted(lacking.items()))
    packages = " ".join(sorted(lacking))
    return f"not run: {counts}; install with: sudo apt-get install --no-install-recommends {packages}"
