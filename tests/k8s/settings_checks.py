"""Where manifests and Easel's settings must say the same."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from cluster.config import DenoiserSettings, Settings, parse_settings
from cluster.errors import ConfigError
from deployments import app
from deployments.local import APP_NAME
from deployments.router import READINESS
from tests.k8s.view import Doc, Pod, View, quantity

ROOT = Path(__file__).resolve().parents[2]
# grpc ends a connection up to this much later than it is told.
AGE_SPREAD = 1.1


def problems(view: View) -> Iterator[str]:
    """Every place where they do not."""
    yield from _application(view)
    try:
        settings = parse_settings(view.arguments)
    except ConfigError as error:
        yield from (f"args: {line}" for line in str(error).splitlines())
        return
    yield from _router_ports(view, settings)
    yield from _places(view, settings)
    yield from _files(view, settings)
    yield from _redis(view, settings)
    yield from _time_to_leave(view, settings)
    if settings.router.host != "0.0.0.0" or settings.denoiser.host != "0.0.0.0":
        yield "router.host, denoiser.host: other pods reach only what listens on 0.0.0.0"


def _application(view: View) -> Iterator[str]:
    served = view.serve["applications"][0]
    module, _, attribute = served["import_path"].partition(":")
    try:
        if not callable(getattr(importlib.import_module(module), attribute)):
            yield f"import_path: {served['import_path']} is no function"
    except (ImportError, AttributeError) as error:
        yield f"import_path: {error}"
    if served["name"] != APP_NAME:
        yield f"the application is called {served['name']}; `easel up` calls it {APP_NAME}"
    if view.serve.get("proxy_location") != "Disabled":
        yield "proxy_location: must be Disabled: routers have their own server"
    if "deployments" in served:
        yield "deployments: every option is one of our settings; two places for one number drift apart"


def group_pods(view: View, selector: Mapping[str, str]) -> list[tuple[Doc, Pod]]:
    """The Ray groups whose nodes a label selector chooses, each with its pod."""
    pods = {pod.owner: pod for pod in view.pods()}
    chosen = [group for group in view.groups if dict(selector).items() <= group.get("labels", {}).items()]
    return [(group, pods[f"group {group['groupName']}"]) for group in chosen]


def _router_ports(view: View, settings: Settings) -> Iterator[str]:
    router = settings.router
    for group, pod in group_pods(view, router.label_selector):
        name = group["groupName"]
        if pod.port("grpc") != router.port:
            yield f"group {name}: container port grpc is {pod.port('grpc')}, router.port is {router.port}"
        if pod.port("health") != router.health_port:
            yield f"group {name}: port health is {pod.port('health')}, router.health_port is {router.health_port}"
        probe = pod.containers[0].get("readinessProbe", {}).get("grpc", {})
        if probe != {"port": router.health_port, "service": READINESS}:
            yield f"group {name}: readiness asks {probe}; router.health_port and service {READINESS} are right"


def _places(view: View, settings: Settings) -> Iterator[str]:
    """That what Serve is asked for has room on the nodes that it may use."""
    router, denoiser = settings.router, settings.denoiser
    if not router.label_selector or not denoiser.label_selector:
        yield "label_selector: routers and denoisers must say on which nodes they run"
        return
    routers, denoisers = group_pods(view, router.label_selector), group_pods(view, denoiser.label_selector)
    both = {group["groupName"] for group, _ in routers} & {group["groupName"] for group, _ in denoisers}
    if both:
        yield f"label_selector: routers and denoisers share the groups {sorted(both)}"
    unused = {group["groupName"] for group in view.groups} - {g["groupName"] for g, _ in (*routers, *denoisers)}
    if unused:
        yield f"label_selector: nothing may run in the groups {sorted(unused)}"
    if router.max_per_node != 1:
        yield "router.max_per_node: must be 1, because a pod has one port"
    fewest = router.replicas if router.autoscaling is None else router.autoscaling.min_replicas
    for when, key, wanted in (
        ("at the start", "replicas", (fewest, denoiser.least_replicas)),
        ("at most", "maxReplicas", (router.most_replicas, denoiser.most_replicas)),
    ):
        fit = sum(group[key] for group, pod in routers if cpus(pod) >= router.num_cpus)
        if fit < wanted[0]:
            yield f"router.replicas: {wanted[0]} are wanted {when}, the nodes have room for {fit}"
        fit = sum(group[key] * _replicas_in(group, pod, denoiser) for group, pod in denoisers)
        if fit < wanted[1]:
            yield f"denoiser.replicas: {wanted[1]} are wanted {when}, the nodes have room for {fit}"
    yield from _gpus(denoisers, denoiser)


def cpus(pod: Pod) -> int:
    """What KubeRay gives `ray start` as num-cpus: the limit, else the request, rounded up."""
    resources = pod.containers[0]["resources"]
    amount = resources.get("limits", {}).get("cpu") or resources["requests"]["cpu"]
    return int(-(-quantity(amount) // 1))


def gpus(pod: Pod) -> int:
    """What KubeRay gives `ray start` as num-gpus."""
    return int(quantity(pod.containers[0]["resources"].get("limits", {}).get("nvidia.com/gpu", 0)))


def _replicas_in(group: Doc, pod: Pod, denoiser: DenoiserSettings) -> int:
    """How many replicas have room in one replica of a group: on each of its hosts, or over all of them."""
    ranks = cpus(pod) // denoiser.num_cpus if denoiser.num_cpus else denoiser.tp
    if denoiser.num_gpus:
        ranks = min(ranks, gpus(pod) // denoiser.num_gpus)
    hosts = group.get("numOfHosts", 1)
    whole = hosts * (ranks // denoiser.tp)
    return int(whole if denoiser.placement == "strict_pack" else max(whole, hosts * ranks // denoiser.tp))


def _gpus(denoisers: list[tuple[Doc, Pod]], denoiser: DenoiserSettings) -> Iterator[str]:
    for group, pod in denoisers:
        wanted = denoiser.tp * denoiser.num_gpus
        have = gpus(pod) * group.get("numOfHosts", 1)
        if have != wanted:
            yield f"group {group['groupName']}: has {have} GPUs, a replica uses {wanted:g}"
        if (denoiser.device == "cuda") != bool(have):
            yield f"group {group['groupName']}: device is {denoiser.device}, the pod has {have} GPUs"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _files(view: View, settings: Settings) -> Iterator[str]:
    """That every file a setting names is there: in the pods that read it, from a Secret that has the key."""
    chosen = {"router": settings.router.label_selector, "denoiser": settings.denoiser.label_selector}
    pods = {role: group_pods(view, labels) for role, labels in chosen.items()}
    for name, value in _leaves(settings.model_dump(mode="json")):
        if not name.endswith("_file") or value is None:
            continue
        routers_only = name.startswith("security.") and not name.startswith("security.internal_tls.")
        for role in ("router",) if routers_only else ("router", "denoiser"):
            for _, pod in pods[role]:
                if not _has_file(pod, PurePosixPath(value)):
                    yield f"{name}: {pod.owner} has no {value}"
    for pod in view.pods():
        for container in pod.containers:
            if container["name"] in ("wait-model", "load") and container["args"] != [settings.checkpoint]:
                yield f"checkpoint: {settings.checkpoint}; {pod.owner} has {container['args']}"
    in_image = re.findall(r"^COPY \S+ (/\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    for _, pod in (*pods["router"], *pods["denoiser"]):
        mounts = [mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]]
        if not any(PurePosixPath(settings.checkpoint).is_relative_to(place) for place in (*mounts, *in_image)):
            yield f"checkpoint: {settings.checkpoint} is neither in the image nor on a volume of {pod.owner}"


def _has_file(pod: Pod, path: PurePosixPath) -> bool:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for mount in pod.containers[0].get("volumeMounts", []):
        if path.parent == PurePosixPath(mount["mountPath"]):
            items = volumes.get(mount["name"], {}).get("secret", {}).get("items", [])
            return path.name in [item["path"] for item in items]
    return False


def redis_hosts(url: str) -> list[tuple[str, int]]:
    """Host and port of every server that a Redis URL names."""
    places = urlsplit(url).netloc.rpartition("@")[2].split(",")
    return [(host, int(port or 6379)) for host, _, port in (place.partition(":") for place in places)]


def serves(view: View, host: str, port: int) -> bool:
    """Whether a name inside the namespace leads to pods that listen on the port."""
    names = host.split(".")
    services = {doc["metadata"]["name"]: doc["spec"] for doc in view.of("Service")}
    spec = services.get(names[-1])
    if spec is None or all(entry["port"] != port for entry in spec["ports"]):
        return False
    pods = view.pods_with({"matchLabels": spec["selector"]})
    if len(names) == 1:
        return bool(pods)
    number = int(names[0].rpartition("-")[2])
    return any(pod.owner == f"StatefulSet/{names[0].rpartition('-')[0]}" and number < pod.count for pod in pods)


def _redis(view: View, settings: Settings) -> Iterator[str]:
    url, options = settings.state.url, view.cluster.get("gcsFaultToleranceOptions", {})
    outside = "easel-state" not in view.names("Service")
    for host, port in redis_hosts(url):
        if not outside and not serves(view, host, port):
            yield f"state.url: nothing answers at {host}:{port}"
        if outside and not url.startswith("rediss"):
            yield "state.url: a Redis outside must be reached over TLS (rediss)"
    of_ray = redis_hosts(options.get("redisAddress", "redis://none"))
    if not all(serves(view, host, port) for host, port in of_ray):
        yield f"gcsFaultToleranceOptions.redisAddress: nothing answers at {of_ray}"
    if set(of_ray) & set(redis_hosts(url)):
        yield "gcsFaultToleranceOptions: Ray must not share the Redis of the jobs"
    if "externalStorageNamespace" in options:
        yield "gcsFaultToleranceOptions.externalStorageNamespace: two clusters of an upgrade would share their state"
    names = set(re.findall(r"[~&]\{(\w+)\}", str(view.docs)))
    if names - {settings.state.namespace}:
        yield f"state.namespace: is {settings.state.namespace}, Redis lets in {sorted(names)}"


def _time_to_leave(view: View, settings: Settings) -> Iterator[str]:
    """That each clock runs out after the one inside it."""
    leave_s = {
        "router": app._router_leaves_within_s(settings),
        "denoiser": app._denoiser_leaves_within_s(settings),
    }
    for role, labels in (("router", settings.router.label_selector), ("denoiser", settings.denoiser.label_selector)):
        for group, pod in group_pods(view, labels):
            environment = {entry["name"]: entry.get("value") for entry in pod.containers[0]["env"]}
            drain_s = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 0)
            kill_s = pod.spec.get("terminationGracePeriodSeconds", 30)
            if not leave_s[role] < drain_s < kill_s:
                times = f"Ray drains {drain_s:g} s, Kubernetes kills after {kill_s} s"
                yield f"group {group['groupName']}: a {role} leaves within {leave_s[role]:g} s, {times}"
    router = settings.router
    longest_s = AGE_SPREAD * router.max_connection_age_s + router.max_connection_age_grace_s
    if router.max_connection_age_s == 0 or view.ray.get("rayClusterDeletionDelaySeconds", 60) <= longest_s:
        yield f"rayClusterDeletionDelaySeconds: must be above the longest stream of {longest_s:g} s"
