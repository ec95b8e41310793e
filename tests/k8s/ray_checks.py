"""What KubeRay and Ray do with a RayService that no schema tells. Each rule names its place in KubeRay v1.7.0."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private.label_utils import validate_label_key, validate_label_value

from tests.k8s.view import View

ROOT = Path(__file__).resolve().parents[2]
H2C = "kubernetes.io/h2c"


def problems(view: View) -> Iterator[str]:
    """Every rule that is broken."""
    yield from _service(view)
    yield from _cluster(view)
    for group in view.groups:
        yield from _group(group["groupName"], group)
    yield from _group("head", view.cluster["headGroupSpec"])
    yield from _environment(view)


def _service(view: View) -> Iterator[str]:
    if view.ray.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "upgradeStrategy: must be NewCluster"
    if view.ray.get("excludeHeadPodFromServeSvc") is not True:
        yield "excludeHeadPodFromServeSvc: must be true; the head runs no router"
    ports = view.ray.get("serveService", {}).get("spec", {}).get("ports", [])
    for port in ports:
        # common/service.go: later versions keep only ports of these names.
        if not (port["name"] == "serve" or port["name"].startswith("serve-")):
            yield f"serveService: port {port['name']}: the name must begin with serve"
        if port.get("appProtocol") != H2C:
            yield f"serveService: port {port['name']}: appProtocol must be {H2C}"
        # The selector is KubeRay's own: all ready workers. Only the name of the target port tells routers from others.
        holders = [
            pod.owner for pod in view.pods() if pod.labels.get("ray.io/is-ray-node") and pod.port(port["targetPort"])
        ]
        if not isinstance(port["targetPort"], str) or not holders:
            yield f"serveService: targetPort {port['targetPort']} must be the name of a port of routers"
        elif any(pod.labels.get("easel/role") != "router" for pod in view.pods() if pod.owner in holders):
            yield f"serveService: targetPort {port['targetPort']}: pods that are no routers have it: {holders}"
    if not ports:
        yield "serveService: has no port"


def _cluster(view: View) -> Iterator[str]:
    cluster = view.cluster
    with (ROOT / "pyproject.toml").open("rb") as file:
        pins = tomllib.load(file)["project"]["dependencies"]
    pinned = next(pin.partition("==")[2] for pin in pins if pin.startswith("ray["))
    if cluster["rayVersion"] != pinned:
        yield f"rayVersion: is {cluster['rayVersion']}, the image has {pinned}"
    if cluster.get("enableInTreeAutoscaling") is not True or cluster["autoscalerOptions"].get("version") != "v2":
        yield "autoscalerOptions.version: must be v2, said explicitly"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode: must be token"
    head = cluster["headGroupSpec"]
    names = [port.get("name", "") for port in head["template"]["spec"]["containers"][0].get("ports", [])]
    # common/service.go, BuildServeService: without ports KubeRay adds its own, serve among them, and then takes over
    # only those ports of serveService that the head has.
    if not names or any(name == "serve" or name.startswith("serve-") for name in names):
        yield "headGroupSpec: the head must list its ports, none called serve"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "headGroupSpec: num-cpus must be 0, so that nothing is placed on the head"
    if view.of("HorizontalPodAutoscaler"):
        yield "HorizontalPodAutoscaler: Serve and Ray's autoscaler own the number of replicas"


def _group(name: str, group: dict[str, object]) -> Iterator[str]:
    parameters, template = group["rayStartParams"], group["template"]
    assert isinstance(parameters, dict)
    assert isinstance(template, dict)
    if "labels" in parameters:  # utils/validation.go, validateRayGroupLabels
        yield f"{name}: labels belong beside rayStartParams, not into it"
    if "resources" in group:  # validateRayGroupResources
        yield f"{name}: resources come from the container's"
    if template["spec"].get("restartPolicy", "Never") != "Never":  # ValidateRayClusterSpec
        yield f"{name}: restartPolicy must be Never or unset with autoscaler v2"
    labels = group.get("labels", {})
    assert isinstance(labels, dict)
    for key, value in labels.items():
        validate_label_value(value)
        said = validate_label_key(key)
        if said:
            yield f"{name}: {said}"
    container = template["spec"]["containers"][0]
    agent, metrics = parameters.get("dashboard-agent-listen-port"), parameters.get("metrics-export-port")
    for kind in ("readinessProbe", "livenessProbe"):
        probe = container.get(kind)
        if probe is None:
            # common/pod.go, initLivenessAndReadinessProbe: the default of a worker asks Serve's proxy too.
            if name != "head":
                yield f"{name}: {kind} must be given: KubeRay's own waits for a Serve proxy"
        elif "httpGet" in probe and (probe["httpGet"]["path"], str(probe["httpGet"]["port"])) != (
            "/api/healthz",
            agent,
        ):
            yield f"{name}: {kind} asks {probe['httpGet']}; Ray's health is /api/healthz at {agent}"
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    if ports.get("metrics") != metrics:
        yield f"{name}: port metrics is {ports.get('metrics')}, metrics-export-port is {metrics}"


@functools.cache
def ray_variables() -> frozenset[str]:
    """Every RAY_ name that Ray's Python code reads."""
    found: set[str] = set()
    folder = Path(ray.__file__).parent
    for path in (*(folder / "_private").glob("*.py"), *(folder / "_common").rglob("*.py")):
        found.update(re.findall(r"[\"'](RAY_[A-Za-z0-9_]+)[\"']", path.read_text()))
    return frozenset(found)


def _environment(view: View) -> Iterator[str]:
    for pod in view.pods():
        for entry in pod.containers[0].get("env", []):
            if entry["name"].startswith("RAY_") and entry["name"] not in ray_variables():
                yield f"{pod.owner}: Ray reads no {entry['name']}"
