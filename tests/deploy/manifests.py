"""The manifests as a cluster would get them, and what it would say to them."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir())

_CRDS = CHECKOUT.parent / "shared" / "crds"
_CRD_FILES = {
    "RayJob": "ray.io_rayjobs.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}
_KUBERNETES = "1.37"
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")

Object = dict[str, Any]


@functools.cache
def build(overlay: str) -> tuple[Object, ...]:
    """The objects of an overlay."""
    directory = DEPLOY / "kubernetes" / "overlays" / overlay
    built = subprocess.run(
        [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def find(overlay: str, kind: str, name: str = "instdisc") -> Object:
    """One object of an overlay."""
    (found,) = [each for each in build(overlay) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
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
