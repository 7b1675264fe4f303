"""What is written in several places says the same in all of them."""

from __future__ import annotations

import re

import pytest
import yaml

from cluster.metrics import MetricTable
from instdisc.common.metrics import EVALUATION, TRAINING
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


@pytest.mark.parametrize(("heading", "table"), [("Training", TRAINING), ("Evaluation", EVALUATION)])
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


def test_one_version_of_ray_everywhere() -> None:
    pin = re.search(r"^ray==(.+)$", (CHECKOUT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin is not None
    images = re.findall(r"^FROM (\S+) AS (\w+)$", (DEPLOY / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert images == [(f"rayproject/ray:{pin[1]}-py311-{target}", target) for target in ("cpu", "gpu")]
    for overlay in OVERLAYS:
        for name in ("instdisc-train", "instdisc-evaluate"):
            assert find(overlay, "RayJob", name)["spec"]["rayClusterSpec"]["rayVersion"] == pin[1]


def test_both_images_end_as_an_ordinary_user() -> None:
    stages = (DEPLOY / "docker/Dockerfile").read_text().split("\nFROM ")[1:]
    assert len(stages) == 2
    for stage in stages:
        users = re.findall(r"^USER (.+)$", stage, flags=re.MULTILINE)
        assert users == ["1000:100"]


def test_the_image_gets_what_it_copies() -> None:
    kept = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().split()
    for copied in re.findall(
        r"^COPY --\S+ (.+) \S+$", (DEPLOY / "docker/Dockerfile").read_text(), re.MULTILINE
    ):
        for source in copied.split():
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
