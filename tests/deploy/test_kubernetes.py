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

from instdisc import evaluate, serve
from instdisc.train import parse
from tests.deploy.manifests import (
    COMPONENTS,
    DEPLOY,
    KUBERNETES,
    OVERLAYS,
    Object,
    build,
    evaluation,
    find,
    kuberay_errors,
    kustomize,
    restricted_errors,
    validate,
    with_everything,
)

JOBS = ("instdisc-train", "instdisc-evaluate")
KINDS = ["Namespace", "NetworkPolicy", "PersistentVolumeClaim", "RayJob", "ServiceAccount"]
ADDED = {
    "gang": ["PodDisruptionBudget", "PodDisruptionBudget", "PriorityClass"],
    "kueue": [],
    "monitoring": ["ConfigMap", "NetworkPolicy", "PodMonitor", "PodMonitor", "PrometheusRule"],
    "s3": [],
}
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
each_job = pytest.mark.parametrize("name", JOBS)


def templates(job: Object) -> list[Object]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def arguments(job: Object, module: str) -> list[str]:
    python, option, name, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (python, option, name) == ("python", "-m", module)
    return rest


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@each_overlay
def test_every_object_is_valid(overlay: str) -> None:
    for each in (*with_everything(overlay), evaluation(overlay)):
        validate(each)
        assert each["kind"] in ("Namespace", "PriorityClass") or each["metadata"]["namespace"] == "instdisc"


@each_overlay
def test_without_components_only_the_operator_of_ray_is_needed(overlay: str) -> None:
    assert sorted(each["kind"] for each in build(overlay)) == KINDS


@pytest.mark.parametrize("component", COMPONENTS)
@each_overlay
def test_each_component_can_be_added_alone(overlay: str, component: str) -> None:
    objects = build(overlay, component)
    assert sorted(each["kind"] for each in objects) == sorted(KINDS + ADDED[component])
    for each in objects:
        validate(each)


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
    broken = copy.deepcopy(next(each for each in with_everything("kind-cpu") if each["kind"] == kind))
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
    for template in templates(find(overlay, "RayJob", name)):
        spec = template["spec"]
        assert not list(restricted_errors(template))
        assert spec["securityContext"]["runAsUser"] >= 1000
        assert spec["serviceAccountName"] == find(overlay, "ServiceAccount")["metadata"]["name"]
        reaches_the_api = (
            template["metadata"]["labels"]["app.kubernetes.io/component"] == "train-head"
            and overlay == "spot"
        )
        assert spec["automountServiceAccountToken"] is reaches_the_api
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "instdisc"
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"].startswith("instdisc:0.1.0-")
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(requests)
            assert {"cpu", "memory"} <= set(limits)
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert set(mounts.values()) == set(volumes)
            temporary = volumes[mounts["/tmp"]]["emptyDir"]
            assert set(temporary) == {"sizeLimit"}  # on disk, and logs come on top
            assert size(temporary["sizeLimit"]) < size(requests["ephemeral-storage"])
            shared = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shared["medium"] == "Memory"
            assert 2 * size(shared["sizeLimit"]) <= size(limits["memory"])


@each_job
@each_overlay
def test_every_node_of_ray_sees_the_claim(overlay: str, name: str) -> None:
    for template in templates(find(overlay, "RayJob", name)):
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


@each_overlay
def test_prometheus_finds_and_reaches_the_metrics(overlay: str) -> None:
    monitor = find(overlay, "PodMonitor")["spec"]
    monitored = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert all(endpoint["honorLabels"] for endpoint in monitor["podMetricsEndpoints"])
    assert "jobLabel" not in monitor  # pods without a worker answer nothing, and must not count as lost
    (selector,) = monitor["selector"]["matchExpressions"]
    rules = find(overlay, "NetworkPolicy", "instdisc-monitoring")["spec"]["ingress"]
    allowed = [port for rule in rules for port in rule.get("ports", []) if port["port"] == 9500]
    declaring = set()
    for name in JOBS:
        for template in templates(find(overlay, "RayJob", name)):
            for port in template["spec"]["containers"][0].get("ports", []):
                if port["name"].startswith("metrics-"):
                    declaring.add(template["metadata"]["labels"][selector["key"]])
                    assert port["name"] in monitored
                    assert any(each["port"] <= port["containerPort"] <= each["endPort"] for each in allowed)
    assert declaring == set(selector["values"])
    assert any(
        port["port"] == 8080 for rule in rules for port in rule["ports"]
    )  # Ray's own, as the operator has it


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
    assert find(overlay, "PrometheusRule")["spec"] == rules, "run components/monitoring/prometheus-rule.sh"
    config_map = find(overlay, "ConfigMap", "instdisc-dashboard")
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    assert json.loads(config_map["data"]["dashboard.json"]) == dashboard


@each_overlay
def test_the_namespace_enforces_what_the_pods_keep(overlay: str) -> None:
    labels = find(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume host"),
        ({"securityContext": {}}, "root"),
        ({"securityContext": {"runAsNonRoot": True}}, "seccomp"),
        ({"containers": [{"name": "bare"}]}, "capabilities"),
    ],
)
def test_what_restricted_refuses_is_found(change: Object, error: str) -> None:
    template = copy.deepcopy(templates(find("kind-cpu", "RayJob", "instdisc-train"))[0])
    template["spec"].update(change)
    assert any(error in each for each in restricted_errors(template))


@each_job
@each_overlay
def test_no_pod_follows_the_log_on_which_the_job_depends(overlay: str, name: str) -> None:
    spec = find(overlay, "RayJob", name)["spec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert not {"submitterPodTemplate", "submitterConfig", "suspend"} & set(spec)


@each_overlay
def test_a_gang_is_not_taken_apart(overlay: str) -> None:
    job = find(overlay, "RayJob", "instdisc-train")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for template, least in zip(templates(job), (1, group["minReplicas"]), strict=True):
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        budget = find(overlay, "PodDisruptionBudget", f"instdisc-{component}")["spec"]
        assert budget == {
            "minAvailable": least,
            "selector": {"matchLabels": {"app.kubernetes.io/component": component}},
        }
        annotations = template["metadata"]["annotations"]
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"
        assert (
            template["spec"]["priorityClassName"]
            == find(overlay, "PriorityClass", "instdisc-training")["metadata"]["name"]
        )
    bare = find_in(build(overlay), "instdisc-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    affinity = group["template"]["spec"]["affinity"]
    assert affinity.items() >= bare["template"]["spec"]["affinity"].items()  # the overlay's own stays
    terms = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert len({term["podAffinityTerm"]["topologyKey"] for term in terms}) == len(terms) == 4


def find_in(objects: tuple[Object, ...], name: str) -> Object:
    (found,) = [each for each in objects if each["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("overlay", [each for each in OVERLAYS if each != "spot"])
def test_kueue_queues_the_job_and_alone_suspends_it(overlay: str) -> None:
    job = find_in(build(overlay, "kueue"), "instdisc-train")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "instdisc"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]  # what Kueue refuses


@each_overlay
def test_credentials_reach_every_pod(overlay: str) -> None:
    for template in templates(find(overlay, "RayJob", "instdisc-train")):
        assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "instdisc-s3"}}]


@pytest.fixture(scope="module")
def serving() -> dict[str, Object]:
    """The objects that serve an index, by kind."""
    return {each["kind"]: each for each in kustomize(KUBERNETES / "serving/overlays/kind-cpu")}


def test_what_serves_is_valid(serving: dict[str, Object]) -> None:
    """A RayService holds a RayCluster and a text, of which each has a schema of its own."""
    assert set(serving) == {"RayService", "NetworkPolicy"}
    validate(serving["NetworkPolicy"])
    service = serving["RayService"]
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = {"apiVersion": service["apiVersion"], "kind": "RayCluster", "metadata": {"name": "x"}}
    validate({**cluster, "spec": service["spec"]["rayClusterConfig"]})
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        validate({**cluster, "spec": {**service["spec"]["rayClusterConfig"], "unknown": 1}})
    selected = serving["NetworkPolicy"]["spec"]["podSelector"]["matchExpressions"][0]["values"]
    for template, component in zip(serving_templates(service), selected, strict=True):
        assert not list(restricted_errors(template))
        assert template["metadata"]["labels"]["app.kubernetes.io/component"] == component
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "instdisc"
        (container,) = template["spec"]["containers"]
        assert container["image"] == "instdisc:0.1.0-cpu"
        environment = {each["name"]: each for each in container["env"]}
        assert environment["INSTDISC_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "instdisc-token"
        (claim,) = [each for each in template["spec"]["volumes"] if "persistentVolumeClaim" in each]
        assert claim["persistentVolumeClaim"]["claimName"] == "instdisc"


def serving_templates(service: Object) -> list[Object]:
    cluster = service["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray itself
def test_what_is_served_is_understood_and_needs_the_token(
    serving: dict[str, Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

    text = yaml.safe_load(serving["RayService"]["spec"]["serveConfigV2"])
    config = ServeDeploySchema(**text)
    (application,) = config.applications
    assert application.import_path == "instdisc.serve:application"
    monkeypatch.delenv("INSTDISC_TOKEN", raising=False)
    with pytest.raises(ValueError, match="need a token"):
        serve.application(application.args)
    monkeypatch.setenv("INSTDISC_TOKEN", "a token for tests, not for use")
    assert isinstance(serve.application(application.args), Application)
    ports = {
        port["name"]: port["containerPort"]
        for template in serving_templates(serving["RayService"])
        for port in template["spec"]["containers"][0]["ports"]
    }
    assert ports["serve"] == config.http_options.port == 8000
    assert ports["metrics-0"] == serve.parse(application.args["options"]).metrics.port
