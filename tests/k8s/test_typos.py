"""A mistake of every kind that the manifests could hold, planted; the checks must find each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.test_overlays import problems
from tests.k8s.view import K8S, Doc, StrictLoader, View, render, render_overlay

GROUPS = "spec/rayClusterConfig/workerGroupSpecs"
ROUTER, DENOISER = f"{GROUPS}/0", f"{GROUPS}/1"
CONTAINER = "template/spec/containers/0"
HEAD = "spec/rayClusterConfig/headGroupSpec"
DROP = object()


def put(docs: list[Doc], kind: str, path: str, value: Any, name: str | None = None) -> None:  # noqa: ANN401 - JSON
    """Set a place of a document (DROP removes it); every step but the last must be there."""
    doc = next(d for d in docs if d["kind"] == kind and name in (None, d["metadata"]["name"]))
    *steps, last = path.split("/")
    for step in steps:
        doc = doc[int(step)] if isinstance(doc, list) else doc[step.replace("~1", "/")]
    key: Any = int(last) if isinstance(doc, list) else last.replace("~1", "/")
    if value is DROP:
        del doc[key]
    else:
        doc[key] = value


RAY_SERVICE: dict[str, tuple[str, Any, str]] = {
    "a field that KubeRay does not know": (f"{ROUTER}/replica", 2, "replica"),
    "a value of the wrong type": (f"{ROUTER}/replicas", "two", "replicas"),
    "an upgrade in place": ("spec/upgradeStrategy/type", "None", "upgradeStrategy"),
    "a head that gets calls": ("spec/excludeHeadPodFromServeSvc", DROP, "excludeHeadPodFromServeSvc"),
    "an old cluster that goes too soon": ("spec/rayClusterDeletionDelaySeconds", 900, "longest stream of 930"),
    "no deletion delay": ("spec/rayClusterDeletionDelaySeconds", DROP, "longest stream"),
    "a target port that is a number": ("spec/serveService/spec/ports/0/targetPort", 8500, "must be the name"),
    "a target port of nobody": ("spec/serveService/spec/ports/0/targetPort", "grcp", "grcp"),
    "a target port that denoisers have too": (f"{DENOISER}/{CONTAINER}/ports/0/name", "grpc", "no routers have it"),
    "a port name that KubeRay drops": ("spec/serveService/spec/ports/0/name", "grpc", "must begin with serve"),
    "no word that the port speaks HTTP/2": ("spec/serveService/spec/ports/0/appProtocol", DROP, "appProtocol"),
    "a head without ports": (f"{HEAD}/{CONTAINER}/ports", [], "must list its ports"),
    "a head with a port called serve": (f"{HEAD}/{CONTAINER}/ports/0/name", "serve", "none called serve"),
    "a head that runs replicas": (f"{HEAD}/rayStartParams/num-cpus", "4", "num-cpus must be 0"),
    "another Ray than the image has": ("spec/rayClusterConfig/rayVersion", "2.59.0", "rayVersion"),
    "an autoscaler by default": ("spec/rayClusterConfig/autoscalerOptions/version", DROP, "must be v2"),
    "no authentication": ("spec/rayClusterConfig/authOptions/mode", "disabled", "authOptions.mode"),
    "a Secret's name without its hash": ("spec/rayClusterConfig/authOptions/secretName", "easel-ray-auth", "no Secret"),
    "a fixed storage namespace": (
        "spec/rayClusterConfig/gcsFaultToleranceOptions/externalStorageNamespace",
        "easel",
        "externalStorageNamespace",
    ),
    "the jobs' Redis for Ray": (
        "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddress",
        "redis://easel-state:6379",
        "must not share",
    ),
    "a Redis for Ray that is not there": (
        "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddress",
        "redis://easel-gcs-reds:6379",
        "nothing answers",
    ),
    "a Secret's key that is not there": (
        "spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef/key",
        "pasword",
        "has no key pasword",
    ),
    "a group label that nothing selects": (f"{ROUTER}/labels/easel~1role", "ruoter", "router.replicas"),
    "a group for nobody": (f"{DENOISER}/labels/easel~1role", "gpu", "denoiser.replicas"),
    "labels in the wrong place": (f"{ROUTER}/rayStartParams/labels", "a=b", "beside rayStartParams"),
    "too few nodes for routers": (f"{ROUTER}/replicas", 0, "room for 0"),
    "a pod too small for a rank": (f"{DENOISER}/{CONTAINER}/resources/requests/cpu", 0, "denoiser.replicas"),
    "fewer nodes than replicas that may come": (f"{ROUTER}/maxReplicas", 0, "are wanted at most"),
    "a GPU that nobody uses": (f"{DENOISER}/{CONTAINER}/resources/limits/nvidia.com~1gpu", "1", "has 1 GPUs"),
    "KubeRay's own readiness": (f"{DENOISER}/{CONTAINER}/readinessProbe", DROP, "waits for a Serve proxy"),
    "a health path that Ray has not": (
        f"{DENOISER}/{CONTAINER}/readinessProbe/httpGet/path",
        "/healthz",
        "Ray's health is",
    ),
    "a health port that Ray has not": (f"{DENOISER}/rayStartParams/dashboard-agent-listen-port", "52366", "52366"),
    "a health service that no router has": (f"{ROUTER}/{CONTAINER}/readinessProbe/grpc/service", "ready", "readiness"),
    "a probe at the wrong port": (f"{ROUTER}/{CONTAINER}/readinessProbe/grpc/port", 8502, "port 8502"),
    "a router's port that is another": (f"{ROUTER}/{CONTAINER}/ports/0/containerPort", 8600, "8600"),
    "metrics at the wrong port": (f"{ROUTER}/{CONTAINER}/ports/2/containerPort", 8081, "metrics-export-port"),
    "a variable that Ray does not read": (
        f"{ROUTER}/{CONTAINER}/env/0/name",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT",
        "Ray reads no",
    ),
    "a setting that Easel has not": (f"{ROUTER}/{CONTAINER}/env/0/name", "EASEL__ROUTER__PROT", "no such setting"),
    "a kill before the drain is over": (
        f"{ROUTER}/template/spec/terminationGracePeriodSeconds",
        60,
        "kills after 60 s",
    ),
    "a drain that is shorter than ours": (f"{DENOISER}/{CONTAINER}/env/0/value", "10", "Ray drains 10 s"),
    "a variable twice": (f"{ROUTER}/{CONTAINER}/env", [{"name": "A", "value": "1"}] * 2, "comes twice"),
    "a volume that is not there": (f"{ROUTER}/{CONTAINER}/volumeMounts/2/name", "state-secrets", "no volume"),
    "a password elsewhere": (f"{ROUTER}/{CONTAINER}/volumeMounts/2/mountPath", "/run/secrets", "password_file"),
    "an account that is not there": (f"{HEAD}/template/spec/serviceAccountName", "default", "no ServiceAccount"),
    "a class that is not there": (f"{ROUTER}/template/spec/priorityClassName", "easel-ruoter", "no PriorityClass"),
    "a pod with a token": (f"{ROUTER}/template/spec/automountServiceAccountToken", True, "must be false"),
    "a pod as root": (f"{DENOISER}/template/spec/securityContext/runAsUser", 0, "not root"),
    "an autoscaler without a token": ("spec/rayClusterConfig/autoscalerOptions/volumeMounts", [], "must have a token"),
    "a restart that autoscaler v2 refuses": (f"{ROUTER}/template/spec/restartPolicy", "Always", "restartPolicy"),
    "another image for one group": (f"{ROUTER}/{CONTAINER}/image", "easel-cpu:other", "must run one"),
    "a spread that counts others": (
        f"{ROUTER}/template/spec/topologySpreadConstraints/0/labelSelector/matchLabels",
        {"easel/role": "routers"},
        "do not count itself",
    ),
}


@pytest.mark.parametrize("mistake", RAY_SERVICE)
def test_a_mistake_in_the_ray_service_is_found(mistake: str) -> None:
    path, value, said = RAY_SERVICE[mistake]
    docs = render_overlay("cpu")
    put(docs, "RayService", path, value)
    assert [line for line in problems(View(docs)) if said in line]


SERVE: dict[str, tuple[str, str, str]] = {
    "a field that Serve does not read": ("route_prefix:", "route_prefixes:", "route_prefixes"),
    "a value that Serve refuses": ("proxy_location: Disabled", "proxy_location: Nowhere", "proxy_location"),
    "an import path of nothing": ("deployments.app:build", "deployments.app:biuld", "import_path"),
    "an application of another name": ("name: easel", "name: weasel", "weasel"),
    "a setting that is none": ("health_port:", "heath_port:", "heath_port: unknown setting"),
    "a setting out of range": ("port: 8500", "port: 85000", "85000 is not allowed"),
    "a port that no pod has": ("port: 8500", "port: 8600", "router.port is 8600"),
    "a label that no group has": ("{easel/role: router}", "{easel/role: routers}", "router.replicas"),
    "no label": ("label_selector: {easel/role: denoiser}", "label_selector: {}", "must say on which nodes"),
    "more routers than nodes": ("replicas: 1\n        max_per_node", "replicas: 3\n        max_per_node", "room for 1"),
    "two routers on a pod": ("max_per_node: 1", "max_per_node: 2", "must be 1"),
    "a Redis that is not there": ("easel-state:6379", "easel-state:6380", "nothing answers at easel-state:6380"),
    "a file that is not mounted": (
        "easel-state/password",
        "easel-state/passwd",
        "has no /run/secrets/easel-state/passwd",
    ),
    "a model that is nowhere": ("/opt/easel/models/tiny", "/models/tiny", "neither in the image"),
    "a GPU where there is none": ("device: cpu", "device: cuda", "device is cuda"),
    "connections that never end": ("max_connection_age_s: 300", "max_connection_age_s: 0", "longest stream"),
    "a server that only its own pod reaches": ("host: 0.0.0.0", "host: 127.0.0.1", "0.0.0.0"),
}


@pytest.mark.parametrize("mistake", SERVE)
def test_a_mistake_in_the_serve_config_is_found(mistake: str) -> None:
    right, wrong, said = SERVE[mistake]
    docs = render_overlay("cpu")
    spec = next(doc for doc in docs if doc["kind"] == "RayService")["spec"]
    text = re.sub(r"(?m)^ *#.*\n", "", spec["serveConfigV2"])
    text = re.sub(r"\n +(?=max_per_node)", "\n        ", text)
    assert right in text
    spec["serveConfigV2"] = text.replace(right, wrong, 1)
    assert [line for line in problems(View(docs)) if said in line]


OTHERS: dict[str, tuple[str, str, str, str, Any, str]] = {
    "a field that Kubernetes does not know": ("small", "StatefulSet", "easel-state", "spec/replica", 3, "replica"),
    "a Service without pods": (
        "small",
        "Service",
        "easel-routers",
        "spec/selector/easel~1role",
        "routers",
        "chooses no pod",
    ),
    "a Service to a port of nobody": (
        "small",
        "Service",
        "easel-routers",
        "spec/ports/0/targetPort",
        "grcp",
        "no port grcp",
    ),
    "a StatefulSet without a Service": (
        "small",
        "StatefulSet",
        "easel-state",
        "spec/serviceName",
        "state",
        "no Service",
    ),
    "a script without a variable": (
        "small",
        "StatefulSet",
        "easel-state",
        "spec/template/spec/containers/0/env/2/name",
        "DATE",
        "uses DATA, which is not set",
    ),
    "a script that is not there": (
        "small",
        "StatefulSet",
        "easel-sentinel",
        "spec/template/spec/containers/0/command/1",
        "/config/start-sentinels.sh",
        "start-sentinels.sh",
    ),
    "a Secret's key in an ExternalSecret": (
        "small",
        "ExternalSecret",
        "easel-state",
        "spec/data/1/secretKey",
        "replication_password",
        "has no key replication-password",
    ),
    "an ExternalSecret under another name": (
        "small",
        "ExternalSecret",
        "easel-ray-auth",
        "spec/target/name",
        "easel-ray",
        "no Secret easel-ray-auth",
    ),
    "a budget in percent": (
        "small",
        "PodDisruptionBudget",
        "easel-routers",
        "spec/minAvailable",
        "50%",
        "must be an integer",
    ),
    "a budget that blocks every drain": (
        "small",
        "PodDisruptionBudget",
        "easel-denoisers",
        "spec/minAvailable",
        1,
        "none could ever be evicted",
    ),
    "a policy for nobody": (
        "small",
        "NetworkPolicy",
        "ray-to-state",
        "spec/podSelector",
        {"matchLabels": {"easel/role": "workers"}},
        "chooses no pod",
    ),
    "an operator that is shut out": (
        "small",
        "NetworkPolicy",
        "operator-to-head",
        "spec/ingress/0/ports/0/port",
        8266,
        "the operator deploys",
    ),
    "a policy that lets everybody in": ("small", "NetworkPolicy", "gcs-redis", "spec/ingress", [{}], "must not reach"),
    "no policy that denies": (
        "small",
        "NetworkPolicy",
        "deny-all",
        "spec/policyTypes",
        ["Ingress"],
        "none denies everything",
    ),
    "an account with a token": (
        "small",
        "ServiceAccount",
        "easel-worker",
        "automountServiceAccountToken",
        True,
        "must be false",
    ),
    "a monitor of a port of nobody": (
        "production",
        "PodMonitor",
        "easel",
        "spec/podMetricsEndpoints/0/port",
        "metric",
        "no pod has a port metric",
    ),
    "a monitor with a field that is none": (
        "production",
        "PodMonitor",
        "easel",
        "spec/podMetricsEndpoint",
        [],
        "podMetricsEndpoint",
    ),
    "a route to a service that is none": (
        "production",
        "GRPCRoute",
        "easel",
        "spec/rules/0/matches/0/method/service",
        "easel.v1.Generator",
        "no service easel.v1.Generator",
    ),
    "a route to a port that is none": (
        "production",
        "GRPCRoute",
        "easel",
        "spec/rules/0/backendRefs/0/port",
        8501,
        "port 8501",
    ),
    "a route of no Gateway": ("production", "GRPCRoute", "easel", "spec/parentRefs/0/name", "weasel", "Gateway weasel"),
    "a Job that loads another model": (
        "small",
        "Job",
        "easel-load-model",
        "spec/template/spec/containers/0/args/0",
        "/models/gemma",
        "checkpoint: /models/diffusiongemma-26b-a4b",
    ),
    "a container before the first one as root": (
        "small",
        "RayService",
        "easel",
        f"{ROUTER}/template/spec/initContainers/0/securityContext",
        {},
        "wait-model: must drop",
    ),
    "a Redis outside without TLS": ("managed-redis", "RayService", "easel", "", None, "must be reached over TLS"),
}


@pytest.mark.parametrize("mistake", OTHERS)
def test_a_mistake_in_another_manifest_is_found(mistake: str) -> None:
    overlay, kind, name, path, value, said = OTHERS[mistake]
    docs = render_overlay(overlay)
    if path:
        put(docs, kind, path, value, name)
    else:
        spec = next(doc for doc in docs if doc["kind"] == kind)["spec"]
        spec["serveConfigV2"] = spec["serveConfigV2"].replace("rediss://", "redis://")
    assert [line for line in problems(View(docs)) if said in line]


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(yaml.constructor.ConstructorError, match="duplicate key 'a'"):
        yaml.load("a: 1\na: 2\n", StrictLoader)


Overlay = Callable[[str, str], Path]


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    """Makes an overlay of the CPU overlay with one patch more; kustomize wants relative paths."""

    def make(target: str, patch: str) -> Path:
        (tmp_path / "k8s").symlink_to(K8S)
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "patch.yaml").write_text(patch)
        base = Path("../k8s/overlays/cpu")
        text = f"resources: [{base}]\npatches:\n  - path: patch.yaml\n{target}"
        (folder / "kustomization.yaml").write_text(text)
        return folder

    return make


def test_a_strategic_merge_that_loses_the_other_groups_is_found(overlay: Overlay) -> None:
    """kustomize does not know how to merge the groups of a RayService: the patch's list replaces all of them."""
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "easel"},
        "spec": {"rayClusterConfig": {"workerGroupSpecs": [{"groupName": "denoiser", "replicas": 2}]}},
    }
    docs = render(overlay("", yaml.safe_dump(patch)))
    service = next(doc for doc in docs if doc["kind"] == "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["denoiser"]
    assert "template" not in groups[0]


def test_a_json_patch_for_another_group_does_not_render(overlay: Overlay) -> None:
    test = f"- {{op: test, path: /{DENOISER}/groupName, value: router}}\n- {{op: remove, path: /{DENOISER}}}\n"
    with pytest.raises(AssertionError, match="test"):
        render(overlay("    target: {kind: RayService, name: easel}\n", test))
