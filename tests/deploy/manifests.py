"""The manifests as a cluster would get them, and what it would say to them."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())

_CRDS = CHECKOUT.parent / "shared" / "crds"
_CRD_FILES = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}
_KUBERNETES = "1.37"
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")

Object = dict[str, Any]


@functools.cache
def build(overlay: str, *components: str) -> tuple[Object, ...]:
    """The objects of an overlay with components, as a kustomization of a user's own gives them."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.relpath(KUBERNETES, Path(folder).resolve())
        own = {
            "resources": [f"{here}/overlays/{overlay}"],
            "components": [f"{here}/components/{each}" for each in components],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(own))
        return kustomize(Path(folder))


@functools.cache
def evaluation(overlay: str) -> Object:
    """The job that evaluates what an overlay trains."""
    (job,) = kustomize(KUBERNETES / "evaluation/overlays" / ("kind-cpu" if overlay == "kind-cpu" else "gpu"))
    return job


def with_everything(overlay: str) -> tuple[Object, ...]:
    """The objects of an overlay with all components that it can have."""
    return build(overlay, *(each for each in COMPONENTS if (overlay, each) != ("spot", "kueue")))


def kustomize(directory: Path) -> tuple[Object, ...]:
    """The objects of a kustomization."""
    built = subprocess.run(
        [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def find(overlay: str, kind: str, name: str = "instdisc") -> Object:
    """One object of an overlay with all components, or the job that evaluates what it trains."""
    objects = (*with_everything(overlay), evaluation(overlay))
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def validate(thing: Object) -> None:
    """Check an object against the schema of its kind; unknown fields are errors."""
    if thing["kind"] not in _CRD_FILES:
        kubernetes_validate.validate(thing, _KUBERNETES, strict=True)
        return
    file = _CRDS / _CRD_FILES[thing["kind"]]
    if not file.exists():
        pytest.skip(f"needs the schema {file.name}")
    jsonschema.Draft202012Validator(_schema(file, thing["apiVersion"])).validate(thing)


@functools.cache
def _schema(file: Path, api_version: str) -> Any:
    definition = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
    versions = {
        f"{definition['group']}/{each['name']}": each["schema"]["openAPIV3Schema"]
        for each in definition["versions"]
    }
    schema = _strict(versions[api_version])
    schema["properties"]["metadata"] = {}  # checked by the API server, not by the definition
    return schema


def _strict(schema: Any) -> Any:
    """The JSON schema that says what an OpenAPI schema of Kubernetes means, and refuses what it does not name."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "x-kubernetes-validations" in schema:
        return False  # a rule in CEL, which nothing here evaluates: no manifest sets such a field
    strict = {
        name: {key: _strict(each) for key, each in value.items()} if name == "properties" else _strict(value)
        for name, value in schema.items()
        if name != "default"
    }
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in strict and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if strict.pop("nullable", False):
        strict["type"] = [strict["type"], "null"]
    return strict


def kuberay_errors(job: Object) -> Iterator[str]:
    """What KubeRay's operator refuses in a RayJob though its schema allows it."""
    name, spec = job["metadata"]["name"], job["spec"]
    cluster = spec["rayClusterSpec"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name!r} is no DNS label of at most 47 characters"
    if spec.get("submissionMode", "K8sJobMode") not in _SUBMISSION_MODES:
        yield f"submissionMode {spec['submissionMode']!r} is none of {', '.join(_SUBMISSION_MODES)}"
    if not spec.get("shutdownAfterJobFinishes"):
        for field in ("ttlSecondsAfterFinished", "suspend"):
            if spec.get(field):
                yield f"{field} needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} is not positive"
    mode = cluster.get("authOptions", {}).get("mode")
    if mode is None:
        yield "authOptions.mode is left to the default"
    if mode == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
        if version < (2, 52):
            yield f"token authentication needs rayVersion 2.52 or newer, not {cluster.get('rayVersion')}"
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        if "labels" in group["rayStartParams"]:
            yield "labels belong into the group's own field"
        if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
            yield "rayStartParams are strings"
        never = group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        if cluster.get("enableInTreeAutoscaling") and not never:
            yield "the autoscaler needs restartPolicy Never"
    for group in groups[1:]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"replicas of {group['groupName']} are not between minimum and maximum"


def restricted_errors(template: Object) -> Iterator[str]:
    """What the Pod Security Standard `restricted` refuses in a pod."""
    spec = template["spec"]
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= _VOLUMES:
            yield f"volume {volume['name']}: {kinds}"
    pod = spec.get("securityContext", {})
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        name, own = container["name"], container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation", True):
            yield f"{name}: privileges"
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {
            "NET_BIND_SERVICE"
        }:
            yield f"{name}: capabilities"
        if (
            not own.get("runAsNonRoot", pod.get("runAsNonRoot"))
            or own.get("runAsUser", pod.get("runAsUser")) == 0
        ):
            yield f"{name}: root"
        profile = own.get("seccompProfile", pod.get("seccompProfile", {}))
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name}: seccomp"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield f"{name}: hostPort"
