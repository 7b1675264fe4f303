"""Who may import whom; read from the source, so that imports inside functions count too."""

import ast
import subprocess
import sys
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
OWNERS: dict[str, str | tuple[str, ...]] = {
    "ray": "cluster/",
    "torch.distributed": "cluster/",
    "zarr": "cluster/",
    "fsspec": ("cluster/", "pipelines/remote.py"),
    "prometheus_client": "cluster/",
    "nvidia.dali": "pipelines/dali.py",
    "nvidia.nvimgcodec": "pipelines/dali_forms.py",
    "timm": "instdisc/model/timm_networks.py",
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
        ("pipelines/reader.py", "import fsspec"),
        ("instdisc/evaluation/images.py", "from fsspec.core import url_to_fs"),
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
        ("pipelines/remote.py", "import fsspec\nfrom fsspec.asyn import sync"),
        ("instdisc/objectives/nce.py", "from ..backbone import Backbone\nfrom pipelines.order import Order"),
        (
            "instdisc/training/trainer.py",
            "import torch\nfrom torch.nn.parallel import DistributedDataParallel\nimport rayon",
        ),
    ],
)
def test_permitted_import_passes(file: str, source: str) -> None:
    assert violations(source, file) == []


def modules() -> dict[str, Path]:
    """All modules of the three packages by their dotted names."""
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for part in ALLOWED_PARTS
        for path in sorted((ROOT / part).rglob("*.py"))
    }


def imports_among(sources: dict[str, str]) -> dict[str, set[str]]:
    """By module, the modules that it imports, in functions and for type checkers too, but for its parents."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {
            name
            for found in imported_names(source, module.replace(".", "/") + ".py")
            for name in (found, found.rpartition(".")[0])
        }
        graph[module] = {name for name in names & sources.keys() if not f"{module}.".startswith(f"{name}.")}
    return graph


def loops(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves by way of others: what is left when those without open imports are taken away."""
    left = {module: set(names) for module, names in graph.items()}
    for forwards in (True, False):
        while True:
            imported = set().union(*left.values())
            done = {
                module
                for module, names in left.items()
                if (not names if forwards else module not in imported)
            }
            if not done:
                break
            left = {module: names - done for module, names in left.items() if module not in done}
    return set(left)


def test_imports_form_no_loop() -> None:
    assert loops(imports_among({name: path.read_text() for name, path in modules().items()})) == set()


def test_a_loop_is_found() -> None:
    sources = {
        "instdisc.a": "def f():\n    from instdisc.b import g",
        "instdisc.b": "if TYPE_CHECKING:\n    from instdisc import a",
        "instdisc.c": "import instdisc.a",
        "instdisc.d": "",
    }
    assert loops(imports_among(sources)) == {"instdisc.a", "instdisc.b"}


def test_training_imports_nothing_of_evaluation() -> None:
    graph = imports_among({name: path.read_text() for name, path in modules().items()})
    reached, unexplored = set(), ["instdisc.train"]
    while unexplored:
        module = unexplored.pop()
        if module not in reached:
            reached.add(module)
            unexplored += graph[module]
    assert "instdisc.training.worker" in reached
    assert not [module for module in reached if module.startswith("instdisc.evaluation")]


def test_the_programs_stand_apart() -> None:
    files = {path.name for path in (ROOT / "instdisc").glob("*.py")}
    programs = {
        "compare.py",
        "embed.py",
        "explore.py",
        "train.py",
        "evaluate.py",
        "search.py",
        "serve.py",
        "export.py",
        "inspect.py",
        "plan.py",
    }
    assert files == {"__init__.py"} | programs


HEAVY = ("torch", "torchvision", "ray", "zarr", "faiss", "nvidia")


@pytest.mark.parametrize(
    "module",
    [
        "instdisc.settings.recipes",
        "instdisc.settings.schema",
        "instdisc.settings.evaluation",
        "instdisc.settings.embed",
        "instdisc.settings.serve",
    ],
)
def test_settings_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == []


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.py")), ids=lambda path: path.name)
def test_cluster_knows_nothing_of_images_losses_or_banks(path: Path) -> None:
    names = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
        if isinstance(name, str)
    }
    words = {word for name in names for word in name.lower().split("_")}
    assert words.isdisjoint({"image", "images", "loss", "losses", "bank", "banks", "embedding", "embeddings"})


def test_no_two_classes_share_a_name() -> None:
    names = [
        node.name
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
