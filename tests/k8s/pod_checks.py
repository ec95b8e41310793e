"""How pods run: without rights they do not need, on one image, with probes that ask something that is there."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s.view import Doc, Pod, View

RAY_HOME = "/home/easel"


def problems(view: View) -> Iterator[str]:
    """Every pod that runs otherwise."""
    images = set()
    for pod in view.pods():
        yield from _rights(pod)
        for container in pod.containers:
            yield from (f"{pod.owner}: {text}" for text in _container(container))
            yield from (f"{pod.owner}: {text}" for text in _probes(pod, container))
        if pod.labels.get("ray.io/is-ray-node") or pod.owner.startswith("Job/"):
            images.add(pod.containers[0]["image"])
            yield from _writable(pod)
    if len(images) != 1:
        yield f"images: head, workers and jobs must run one, not {sorted(images)}"
    yield from _tokens(view)
    levels = [doc["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") for doc in view.of("Namespace")]
    if levels != ["restricted"]:
        yield f"Namespace: pod-security.kubernetes.io/enforce must be restricted, is {levels}"
    wrong = [doc["metadata"]["name"] for doc in view.docs if doc["metadata"].get("namespace", "easel") != "easel"]
    if wrong:
        yield f"namespace: {wrong} are elsewhere"


def _rights(pod: Pod) -> Iterator[str]:
    """What the profile `restricted` asks of a pod."""
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
        yield f"{pod.owner}: must run as a user that is not root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{pod.owner}: seccompProfile must be RuntimeDefault"
    if pod.labels.get("ray.io/is-ray-node") and context.get("runAsUser") != 1000:
        yield f"{pod.owner}: the image's user is 1000"


def _container(container: Doc) -> Iterator[str]:
    name, context = container["name"], container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: must drop all capabilities and forbid to gain any"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: its root file system must be read-only"
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
        yield f"{name}: must request cpu and memory, and limit memory"
    tag = container["image"].rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        yield f"{name}: {container['image']} must have a tag that stays"


def _probes(pod: Pod, container: Doc) -> Iterator[str]:
    for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
        probe = container.get(kind)
        if probe is None:
            continue
        action = next(probe[way] for way in ("httpGet", "tcpSocket", "grpc") if way in probe)
        port = action["port"]
        # The dashboard agent's port is Ray's own, inside the pod (ray_checks).
        if port != 52365 and pod.port(port) is None:
            yield f"{container['name']}: {kind} asks port {port}, which no container has"


def _writable(pod: Pod) -> Iterator[str]:
    mounts = {mount["mountPath"] for mount in pod.containers[0].get("volumeMounts", [])}
    for place in ("/tmp", RAY_HOME):
        if place not in mounts:
            yield f"{pod.owner}: must be able to write to {place}"


def _tokens(view: View) -> Iterator[str]:
    for doc in view.of("ServiceAccount"):
        if doc.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {doc['metadata']['name']}: automountServiceAccountToken must be false"
    for pod in view.pods():
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: automountServiceAccountToken must be false"
    holders = {
        (pod.owner, volume["name"])
        for pod in view.pods()
        for volume in pod.spec.get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in view.cluster["autoscalerOptions"].get("volumeMounts", [])}
    # Where Ray's autoscaler looks (ray/autoscaler/_private/kuberay/node_provider.py).
    wanted = "/var/run/secrets/kubernetes.io/serviceaccount"
    if [mounts.get(name) for owner, name in holders if owner == "head"] != [wanted] or len(holders) != 1:
        yield f"the autoscaler, and nobody else, must have a token at {wanted}"
    used = {mount["name"] for mount in view.head().containers[0].get("volumeMounts", [])}
    if used & {name for _, name in holders}:
        yield "the head's own container must not have the autoscaler's token"
