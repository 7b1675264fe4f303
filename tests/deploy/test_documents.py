"""What is written in several places says the same in all of them."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from cluster.metrics import MetricTable
from instdisc.common.metrics import EVALUATION, SERVING, TRAINING
from tests.deploy.manifests import (
    CHECKOUT,
    COMPONENTS,
    DEPLOY,
    KUBERNETES,
    OVERLAYS,
    find,
    restricted_errors,
    validate,
)

README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()
DEVICES = ("cpu", "gpu")


@pytest.mark.parametrize(
    ("heading", "table"), [("Training", TRAINING), ("Evaluation", EVALUATION), ("Serving", SERVING)]
)
def test_documented_metrics_are_those_exported(heading: str, table: MetricTable) -> None:
    section = README.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert documented == [(table.prefix + metric.name, metric.kind, metric.help) for metric in table.metrics]


def test_documented_commands_name_where_they_go() -> None:
    commands = re.findall(r"kubectl (exec|cp|logs|describe pod|get|wait|patch)\b([^`\n]*)", README)
    assert {"exec", "get", "wait"} <= {verb for verb, _ in commands}
    for verb, rest in commands:
        if rest.strip() and verb != "cp" and not rest.startswith(" node"):
            assert re.search(r"-n (instdisc|monitoring)\b", rest), verb + rest
        if verb == "exec" and not rest.startswith(" -n instdisc files"):
            assert re.search(r" -c ray-(head|worker) -- ", rest), verb + rest  # a pod may have a sidecar
        if "--watch" in rest:
            assert "," not in rest.partition("#")[0], "kubectl watches one kind at a time"


def test_the_kustomization_to_write_names_what_is_there() -> None:
    text = re.search(r"^```yaml\n(# deploy/kubernetes/own/.+?)^```", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    own = yaml.safe_load(text[1])
    for path in own["resources"] + own["components"]:
        assert (
            (KUBERNETES / "own" / ".." / path.removeprefix("../") / "kustomization.yaml").resolve().exists()
        )
    described = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", README.partition("| component |")[2], re.MULTILINE)
    assert set(COMPONENTS) == set(described[: len(COMPONENTS)])


def test_the_pod_that_copies_files_may_run_in_the_namespace() -> None:
    text = re.search(r"^    kubectl apply -f - <<END\n(.+?)^    END$", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    pod = yaml.safe_load(text[1])
    validate(pod)
    assert not list(restricted_errors(pod))
    (claim,) = (volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"])
    assert claim == find("kind-cpu", "PersistentVolumeClaim")["metadata"]["name"]


def pinned(package: str) -> str:
    pin = re.search(rf"^{package}==(.+)$", (CHECKOUT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin is not None
    return pin[1]


@pytest.mark.parametrize("name", ["instdisc-train", "instdisc-evaluate"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_version_of_ray_everywhere(overlay: str, name: str) -> None:
    assert find(overlay, "RayJob", name)["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")


def test_the_image_of_either_device_is_built_by_the_same_lines() -> None:
    base, *settings, image = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert base.endswith(" AS base\n\n")
    assert {part.partition("\n")[0] for part in settings} == {f"base AS {each}-settings" for each in DEVICES}
    assert image.startswith("${DEVICE}-settings\n")
    assert not re.search(r"\b(cpu|gpu)\b", image)
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for part in settings:
        variables = dict(re.findall(r"\b([A-Z_]+)=(\"[^\"]*\"|\S*)", part))
        assert {"EXTRAS", "TORCH_FROM", "COMPILER"} <= set(variables)
        assert set(variables["EXTRAS"].split(",")) <= set(extras)
        cuda = variables.get("NVIDIA_REQUIRE_CUDA")
        assert cuda in (None, f'"cuda>={pinned("cuda-toolkit").partition(".")[0]}.0"')
    built = re.findall(r"--build-arg DEVICE=(\w+) -t \S*instdisc:0\.1\.0-(\w+) ", DOCKERFILE + README)
    assert built == [(each, each) for each in DEVICES] * 2


def test_the_image_ends_as_an_ordinary_user() -> None:
    assert re.findall(r"^USER (.+)$", DOCKERFILE, flags=re.MULTILINE) == ["1000:100"]
    assert DOCKERFILE.endswith("\nUSER 1000:100\n")


def test_the_image_gets_what_it_copies() -> None:
    kept = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().split()
    copies = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert copies
    for source in " ".join(copies).split():
        assert (CHECKOUT / source).exists()
        assert f"!{source}" in kept


def test_compose_mounts_what_there_is() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    sources = [
        volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
        for service in services.values()
        for volume in service["volumes"]
    ]
    local = [source for source in sources if source.startswith("./")]
    assert len(local) == 3
    for source in local:
        assert (DEPLOY / source).exists()
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "images are pinned"
    datasource = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    listening = next(each for each in services["prometheus"]["command"] if "listen-address" in each)
    assert datasource["datasources"][0]["url"].removeprefix("http://") == listening.partition("=")[2]
