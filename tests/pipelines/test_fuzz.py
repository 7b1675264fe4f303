import json
import subprocess
import sys
from pathlib import Path


def test_damaged_images_are_named_and_harm_no_other() -> None:
    """In a process of its own: what must not happen is that DALI ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.fuzz", "--mutations", "500"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["refused"] > 200
    assert found["accepted"] > 100
