#!/usr/bin/env bash
# What the programs depend on, in the versions of constraints.txt, into the Python of the Ray image.
set -euo pipefail
python - <<'PYTHON' > /tmp/requirements.txt
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + [each for name in extras if name != "dev" for each in extras[name]]))
PYTHON
pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/requirements.txt
rm /tmp/requirements.txt
