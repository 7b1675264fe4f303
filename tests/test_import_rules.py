"""Who may import whom; read from the source, so that imports inside functions count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ALLOWED_PARTS = {
    "cluster": {"cluster"},
    "pipelines": {"pipelines"},
    "instdisc": {"cluster", "instdisc", "pipelines"},
    "examples": {"cluster", "examples", "instdisc", "pipelines"},
}
OWNERS = {
    "ray": "cluster/",
    "torch.distributed": "cluster/",
    "zarr": "cluster/",
    "prometheus_client": "cluster/",
    "nvidia.dali": "pipelines/dali.py",
}


def imported_names(source: str, file: str) -> Iterator[str]:
    """Yield all that `source` may import, as absolute dotted names, and every use of `torch.distributed`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def violations(source: str, file: str) -> list[str]:
    """Return the names that `file` (a posix path below the root) must not import."""
    parts = ALLOWED_PARTS[file.partition("/")[0]]
    found = []
    for name in imported_names(source, file):
        top = name.partition(".")[0]
        owners = [owner for library, owner in OWNERS.items() if f"{name}.".startswith(f"{library}.")]
        if (top in {*ALLOWED_PARTS, "tests", "benchmarks"} and top not in parts) or any(
            not file.startswith(owner) for owner in owners
        ):
            found.append(name)
    return found


@pytest.mark.parametrize(
    "file",
    [
        path.relative_to(ROOT).as_posix()
        for part in ALLOWED_PARTS
        for path in sorted((ROOT / part).rglob("*.py"))
    ],
)
def test_file_imports_what_its_part_may(file: str) -> None:
    assert violations((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("instdisc/training/trainer.py", "import ray"),
        ("instdisc/training/trainer.py", "import torch.distributed as dist"),
        ("instdisc/training/trainer.py", "from torch import distributed"),
        ("instdisc/training/trainer.py", "import torch\ndef f(): torch.distributed.barrier()"),
        ("instdisc/model/votes.py", "def f():\n    from ray.train import report"),
        ("instdisc/objectives/nce.py", "from tests.reference import nce"),
        ("pipelines/loader.py", "from nvidia import dali"),
        ("pipelines/order.py", "from cluster.exchange import Exchange"),
        ("cluster/topk.py", "import pipelines"),
        ("instdisc/train.py", "from examples.custom_objective import Decoupled"),
        ("examples/custom_objective.py", "from tests.ray_cluster import ray_head"),
        ("cluster/topk.py", "if True:\n    from instdisc.model.bank import Bank"),
    ],
)
def test_forbidden_import_is_found(file: str, source: str) -> None:
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cluster/launch.py", "def f():\n    import ray.train\n    import torch.distributed"),
        ("pipelines/dali.py", "from nvidia.dali import fn, types"),
        ("pipelines/dali.py", "from .errors import DataError"),
        ("instdisc/objectives/nce.py", "from ..backbone import Backbone\nfrom pipelines.order import Order"),
        (
            "instdisc/training/trainer.py",
            "import torch\nfrom torch.nn.parallel import DistributedDataParallel\nimport rayon",
        ),
    ],
)
def test_permitted_import_passes(file: str, source: str) -> None:
    assert violations(source, file) == []
