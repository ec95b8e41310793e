"""Who reaches whom: Services, policies, routes and monitors, worked out as Kubernetes would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.rpc.easel.v1 import cluster_pb2, generation_pb2, jobs_pb2
from tests.k8s.view import Doc, Pod, View, selects

# From a namespace (its labels) outside.
OPERATOR = ({"kubernetes.io/metadata.name": "kuberay-system"}, {"app.kubernetes.io/name": "kuberay-operator"})
CLIENT = ({"kubernetes.io/metadata.name": "shop", "easel/client": "true"}, {"app": "shop"})
STRANGER = ({"kubernetes.io/metadata.name": "else"}, {"app": "else"})
PROMETHEUS = ({"kubernetes.io/metadata.name": "monitoring"}, {"app": "prometheus"})
OURS = {"kubernetes.io/metadata.name": "easel"}
RAY = ("head", "router", "denoiser")
ANY_PORT = 33333

Peer = tuple[dict[str, str], dict[str, str]]


def problems(view: View) -> Iterator[str]:
    """Every connection that must be and is not, or is and must not be, and every object that matches nothing."""
    yield from _services(view)
    yield from _connections(view)
    yield from _selectors(view)
    yield from _budgets(view)
    yield from _monitor(view)
    yield from _routes(view)


def role(view: View, name: str) -> Pod | None:
    """A pod of a role."""
    return next((pod for pod in view.pods() if pod.labels.get("easel/role") == name), None)


def _services(view: View) -> Iterator[str]:
    for doc in view.of("Service"):
        name, spec = doc["metadata"]["name"], doc["spec"]
        pods = view.pods_with({"matchLabels": spec["selector"]})
        if not pods:
            yield f"Service {name}: its selector chooses no pod"
        for port in spec["ports"]:
            target = port.get("targetPort", port["port"])
            yield from (f"Service {name}: {pod.owner} has no port {target}" for pod in pods if pod.port(target) is None)
            if any("grpc" in str(target) for _ in pods) and port.get("appProtocol") != "kubernetes.io/h2c":
                yield f"Service {name}: gRPC needs appProtocol kubernetes.io/h2c"
    for doc in view.of("StatefulSet"):
        if doc["spec"]["serviceName"] not in view.names("Service"):
            yield f"StatefulSet {doc['metadata']['name']}: no Service {doc['spec']['serviceName']}"
        if not selects(doc["spec"]["selector"], doc["spec"]["template"]["metadata"]["labels"]):
            yield f"StatefulSet {doc['metadata']['name']}: its selector does not choose its pods"


def _must(view: View) -> Iterator[tuple[str, Any, Any, int]]:
    """(why, from, to, port) of every connection that must be; a pod, or a peer outside."""
    head, router, denoiser = (role(view, name) for name in RAY)
    ray = (head, router, denoiser)
    yield from ((f"Ray, port {ANY_PORT}", source, target, ANY_PORT) for source in ray for target in ray)
    yield "the operator deploys", OPERATOR, head, 8265
    yield "callers", CLIENT, router, 8500
    yield "the head's state", head, role(view, "gcs-redis"), 6379
    yield from (("names", pod, "dns", 53) for pod in view.pods())
    yield "the autoscaler asks the API server", head, "outside", 443
    state, sentinel = role(view, "state"), role(view, "sentinel")
    for source in (router, denoiser):
        yield "job state", source, state or "outside-redis", 6379
    if sentinel is not None:
        for source in (router, denoiser, state, sentinel):
            yield "who is the primary", source, sentinel, 26379
        yield from (("replication and watching", source, state, 6379) for source in (state, sentinel))
    if view.of("PodMonitor"):
        yield from (("metrics", PROMETHEUS, pod, 8080) for pod in ray)


def _must_not(view: View) -> Iterator[tuple[str, Any, Any, int]]:
    head, router, denoiser = (role(view, name) for name in RAY)
    redis = [pod for name in ("state", "sentinel", "gcs-redis") if (pod := role(view, name)) is not None]
    for pod in view.pods():
        yield from (("strangers", STRANGER, pod, port) for port in (8500, 8265, 6379, 26379, 8080))
    for pod in (head, denoiser, *redis):
        yield "callers reach routers only", CLIENT, pod, 8500
    for target in redis:
        yield "the operator", OPERATOR, target, 6379
        yield "callers", CLIENT, target, 6379
    yield "the operator needs the dashboard only", OPERATOR, head, 10001
    yield "callers need the calls only", CLIENT, router, 8501
    gcs = role(view, "gcs-redis")
    state = role(view, "state")
    others = [pod for pod in (router, denoiser, state) if pod is not None]
    yield from (("the head's Redis is the head's", source, gcs, 6379) for source in others)
    if state is not None:
        yield "the jobs' Redis is the jobs'", head, state, 6379
    yield from (("workers stay inside", source, "outside", 443) for source in (router, denoiser, *redis))


def _connections(view: View) -> Iterator[str]:
    for wanted, flows in ((True, _must(view)), (False, _must_not(view))):
        for why, source, target, port in flows:
            if source is None or target is None:
                yield f"network ({why}): a role has no pod"
            elif (allowed(view, source, target, port)) is not wanted:
                word = "must reach" if wanted else "must not reach"
                yield f"network ({why}): {_called(source)} {word} {_called(target)} at {port}"


def _called(end: Pod | Peer | str) -> str:
    return end.owner if isinstance(end, Pod) else str(end)


def allowed(view: View, source: Pod | Peer, target: Pod | str, port: int) -> bool:
    """Whether the policies let a connection out at its source and in at its target."""
    out = not isinstance(source, Pod) or _lets(view, source, "Egress", target, port)
    into = not isinstance(target, Pod) or _lets(view, target, "Ingress", source, port)
    return out and into


def _lets(view: View, pod: Pod, direction: str, other: Pod | Peer | str, port: int) -> bool:
    policies = [
        doc["spec"]
        for doc in view.of("NetworkPolicy")
        if direction in doc["spec"]["policyTypes"] and selects(doc["spec"]["podSelector"], pod.labels)
    ]
    if not policies:
        return True
    rules = [rule for spec in policies for rule in spec.get(direction.lower(), [])]
    listener = pod if direction == "Ingress" else other
    return any(_has_port(rule, listener, port) and _has_peer(rule, direction, other) for rule in rules)


def _has_port(rule: Doc, listener: Pod | Peer | str, port: int) -> bool:
    if "ports" not in rule:
        return True
    for entry in rule["ports"]:
        number = entry["port"]
        if isinstance(number, str):
            number = listener.port(number) if isinstance(listener, Pod) else None
        if number == port:
            return True
    return False


def _has_peer(rule: Doc, direction: str, other: Pod | Peer | str) -> bool:
    peers = rule.get("from" if direction == "Ingress" else "to")
    if peers is None:
        return True
    return any(_is_peer(peer, other) for peer in peers)


def _is_peer(peer: Doc, other: Pod | Peer | str) -> bool:
    if isinstance(other, str):
        if other == "dns":
            return selects(
                peer.get("namespaceSelector", {"matchLabels": {"no": "pod"}}),
                {"kubernetes.io/metadata.name": "kube-system"},
            )
        return other == "outside-redis" and "ipBlock" in peer
    namespace, labels = (OURS, other.labels) if isinstance(other, Pod) else other
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" not in peer and not isinstance(other, Pod):
        return False
    return selects(peer.get("namespaceSelector", {}), namespace) and selects(peer.get("podSelector", {}), dict(labels))


def _selectors(view: View) -> Iterator[str]:
    """Selectors that choose nothing: a misspelt label is silent otherwise."""
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in [d["spec"] for d in view.of("NetworkPolicy")]:
        yield "NetworkPolicy: none denies everything to all pods, those of tomorrow too"
    for doc in view.of("NetworkPolicy"):
        name, spec = doc["metadata"]["name"], doc["spec"]
        if not view.pods_with(spec["podSelector"]):
            yield f"NetworkPolicy {name}: chooses no pod"
        peers = [
            p
            for rule in (*spec.get("ingress", []), *spec.get("egress", []))
            for p in (*rule.get("from", []), *rule.get("to", []))
        ]
        for peer in peers:
            if "namespaceSelector" not in peer and "podSelector" in peer and not view.pods_with(peer["podSelector"]):
                yield f"NetworkPolicy {name}: a peer chooses no pod: {peer['podSelector']}"
        for rule in spec.get("ingress", []):
            named = [entry["port"] for entry in rule.get("ports", []) if isinstance(entry["port"], str)]
            pods = view.pods_with(spec["podSelector"])
            yield from (
                f"NetworkPolicy {name}: no pod has a port {port}"
                for port in named
                if not any(pod.port(port) for pod in pods)
            )
    for pod in view.pods():
        for spread in pod.spec.get("topologySpreadConstraints", []):
            if not selects(spread["labelSelector"], pod.labels):
                yield f"{pod.owner}: its topologySpreadConstraints do not count itself"


def _budgets(view: View) -> Iterator[str]:
    for doc in view.of("PodDisruptionBudget"):
        name, spec = doc["metadata"]["name"], doc["spec"]
        pods = view.pods_with(spec["selector"])
        least = spec.get("minAvailable")
        if not isinstance(least, int):
            yield f"PodDisruptionBudget {name}: minAvailable must be an integer, is {least!r}"
        elif not pods:
            yield f"PodDisruptionBudget {name}: chooses no pod"
        elif sum(pod.count for pod in pods) <= least and least > 0:
            yield f"PodDisruptionBudget {name}: of {sum(pod.count for pod in pods)} pods none could ever be evicted"


def _monitor(view: View) -> Iterator[str]:
    for doc in view.of("PodMonitor"):
        pods = view.pods_with(doc["spec"]["selector"])
        ports = [endpoint["port"] for endpoint in doc["spec"]["podMetricsEndpoints"]]
        yield from (
            f"PodMonitor: no pod has a port {port}" for port in ports if not any(pod.port(port) for pod in pods)
        )
        missed = {pod.owner for pod in view.pods() if pod.labels.get("ray.io/is-ray-node")} - {
            pod.owner for pod in pods
        }
        if missed:
            yield f"PodMonitor: does not choose {sorted(missed)}"


def _routes(view: View) -> Iterator[str]:
    served = view.ray["serveService"]
    ports = {served["metadata"]["name"]: {port["port"] for port in served["spec"]["ports"]}}
    ports |= {doc["metadata"]["name"]: {port["port"] for port in doc["spec"]["ports"]} for doc in view.of("Service")}
    public = {
        service.full_name
        for file in (generation_pb2, jobs_pb2, cluster_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    }
    gates = {
        doc["metadata"]["name"]: {entry["name"] for entry in doc["spec"]["listeners"]} for doc in view.of("Gateway")
    }
    for doc in view.of("GRPCRoute"):
        for parent in doc["spec"]["parentRefs"]:
            if parent["sectionName"] not in gates.get(parent["name"], set()):
                yield f"GRPCRoute: no listener {parent['sectionName']} of a Gateway {parent['name']}"
        for rule in doc["spec"]["rules"]:
            yield from (
                f"GRPCRoute: Easel has no service {match['method']['service']}"
                for match in rule["matches"]
                if match["method"]["service"] not in public
            )
            yield from (
                f"GRPCRoute: no Service {backend['name']} with port {backend['port']}"
                for backend in rule["backendRefs"]
                if backend["port"] not in ports.get(backend["name"], set())
            )
