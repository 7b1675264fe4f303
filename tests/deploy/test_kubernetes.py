"""Every overlay builds, is valid, fits together, and runs commands that the programs understand."""

from __future__ import annotations

import copy
import json
import shlex
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from instdisc import evaluate
from instdisc.train import parse
from tests.deploy.manifests import DEPLOY, OVERLAYS, Object, build, find, kuberay_errors, validate

JOBS = ("instdisc-train", "instdisc-evaluate")
KINDS = [
    *("ConfigMap", "Namespace", "NetworkPolicy", "PersistentVolumeClaim"),
    *("PodMonitor", "PrometheusRule", "RayJob", "RayJob"),
]
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
each_job = pytest.mark.parametrize("name", JOBS)


def pod_specs(job: Object) -> list[Object]:
    spec = job["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"], *(group["template"] for group in groups)]


def arguments(job: Object, module: str) -> list[str]:
    python, option, name, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (python, option, name) == ("python", "-m", module)
    return rest


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@each_overlay
def test_every_object_is_valid(overlay: str) -> None:
    assert sorted(each["kind"] for each in build(overlay)) == KINDS
    for each in build(overlay):
        validate(each)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "instdisc"


@pytest.mark.parametrize(
    ("kind", "path", "error"),
    [
        ("NetworkPolicy", ["spec", "igress"], kubernetes_validate.ValidationError),
        ("PersistentVolumeClaim", ["spec", "resources", "request"], kubernetes_validate.ValidationError),
        ("PodMonitor", ["spec", "podMetricsEndpoint"], jsonschema.ValidationError),
        ("PrometheusRule", ["spec", "group"], jsonschema.ValidationError),
        ("RayJob", ["spec", "backoffLimits"], jsonschema.ValidationError),
        ("RayJob", ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "tolerance"], None),
    ],
)
def test_unknown_field_is_refused(kind: str, path: list[str], error: type[Exception] | None) -> None:
    broken = copy.deepcopy(next(each for each in build("kind-cpu") if each["kind"] == kind))
    place: Any = broken
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = {}
    with pytest.raises(error or jsonschema.ValidationError, match=path[-1]):
        validate(broken)


@each_job
@each_overlay
def test_the_operator_accepts_the_job(overlay: str, name: str) -> None:
    assert list(kuberay_errors(find(overlay, "RayJob", name))) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
        ({"submissionMode": "SSHMode"}, "SSHMode"),
        ({"backoffLimit": -1}, "negative"),
        ({"preRunningDeadlineSeconds": 0}, "not positive"),
    ],
)
def test_what_the_operator_refuses_is_found(change: Object, text: str) -> None:
    job = copy.deepcopy(find("kind-cpu", "RayJob", "instdisc-train"))
    job["spec"].update(change)
    assert any(text in error for error in kuberay_errors(job))


@each_job
@each_overlay
def test_pods_have_no_rights_they_do_not_need(overlay: str, name: str) -> None:
    for template in pod_specs(find(overlay, "RayJob", name)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "instdisc"
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"].startswith("instdisc:0.1.0-")
            for resource in ("cpu", "memory"):
                assert resource in container["resources"]["requests"]
                assert resource in container["resources"]["limits"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert set(mounts.values()) == set(volumes)
            assert volumes[mounts["/tmp"]]["emptyDir"] == {}
            if "/dev/shm" in mounts:
                shared = volumes[mounts["/dev/shm"]]["emptyDir"]
                assert shared["medium"] == "Memory"
                assert 2 * size(shared["sizeLimit"]) <= size(container["resources"]["limits"]["memory"])


@each_job
@each_overlay
def test_every_node_of_ray_sees_the_claim(overlay: str, name: str) -> None:
    for template in pod_specs(find(overlay, "RayJob", name))[1:]:
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert claims == [find(overlay, "PersistentVolumeClaim")["metadata"]["name"]]


@each_overlay
def test_a_stopped_job_ends_as_by_ctrl_c_and_a_retry_resumes(overlay: str) -> None:
    job = find(overlay, "RayJob", "instdisc-train")["spec"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {each["name"]: each["value"] for each in head["env"]}
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert job["backoffLimit"] > 0
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@each_overlay
def test_workers_of_a_deleted_pod_have_the_time_to_save(overlay: str) -> None:
    job = find(overlay, "RayJob", "instdisc-train")
    _, config = parse(arguments(job, "instdisc.train"))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec = group["template"]["spec"]
    environment = {each["name"]: each["value"] for each in spec["containers"][0]["env"]}
    drained = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert config.launch.stop_grace_s <= drained <= spec["terminationGracePeriodSeconds"] - 15


@each_overlay
def test_the_training_command_is_understood_and_fits_the_pods(overlay: str) -> None:
    job = find(overlay, "RayJob", "instdisc-train")
    _, config = parse(arguments(job, "instdisc.train"))
    assert config.run_dir is not None
    assert str(config.run_dir).startswith("/data/runs/")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    per_pod = gpus or int(container["resources"]["limits"]["cpu"])
    assert config.launch.num_workers == group["maxReplicas"] * per_pod
    assert config.launch.gpus_per_worker == (1 if gpus else None)
    fewest = getattr(config.launch, "min_workers", None) or config.launch.num_workers
    assert fewest == group["minReplicas"] * per_pod
    assert group["replicas"] == group["minReplicas"]  # KubeRay submits the job once they all run
    for pods in range(group["minReplicas"], group["maxReplicas"] + 1):
        assert config.training.batch_size % (pods * per_pod) == 0
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {f"metrics-{number}": 9500 + number for number in range(per_pod)}


@each_overlay
def test_the_evaluation_command_is_understood_and_names_the_run(overlay: str) -> None:
    job = find(overlay, "RayJob", "instdisc-evaluate")
    evaluate.parse(arguments(job, "instdisc.evaluate"))
    _, config = parse(arguments(find(overlay, "RayJob", "instdisc-train"), "instdisc.train"))
    assert arguments(job, "instdisc.evaluate")[0] == str(config.run_dir)
    assert job["spec"]["suspend"] is True


@each_overlay
def test_prometheus_finds_and_reaches_the_metrics(overlay: str) -> None:
    monitor = find(overlay, "PodMonitor")["spec"]
    monitored = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert all(endpoint["honorLabels"] for endpoint in monitor["podMetricsEndpoints"])
    assert "jobLabel" not in monitor  # pods without a worker answer nothing, and must not count as lost
    (selector,) = monitor["selector"]["matchExpressions"]
    rules = find(overlay, "NetworkPolicy")["spec"]["ingress"]
    allowed = [port for rule in rules for port in rule.get("ports", []) if port["port"] == 9500]
    declaring = set()
    for name in JOBS:
        for template in pod_specs(find(overlay, "RayJob", name)):
            for port in template["spec"]["containers"][0].get("ports", []):
                if port["name"].startswith("metrics-"):
                    declaring.add(template["metadata"]["labels"][selector["key"]])
                    assert port["name"] in monitored
                    assert any(each["port"] <= port["containerPort"] <= each["endPort"] for each in allowed)
    assert declaring == set(selector["values"])


@each_overlay
def test_names_are_asked_for_wherever_the_cluster_answers(overlay: str) -> None:
    """A cache on the node is no pod of any namespace."""
    rules = find(overlay, "NetworkPolicy")["spec"]["egress"]
    (rule,) = (rule for rule in rules if any(port["port"] == 53 for port in rule.get("ports", [])))
    assert "to" not in rule
    assert {port["protocol"] for port in rule["ports"]} == {"UDP", "TCP"}


@each_overlay
def test_rules_and_dashboard_are_those_used_elsewhere(overlay: str) -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    assert find(overlay, "PrometheusRule")["spec"] == rules, "run deploy/kubernetes/base/prometheus-rule.sh"
    config_map = find(overlay, "ConfigMap", "instdisc-dashboard")
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    assert json.loads(config_map["data"]["dashboard.json"]) == dashboard
