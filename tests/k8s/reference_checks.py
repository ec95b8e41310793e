"""That everything a manifest names is there: Secrets and their keys, volumes, accounts, classes, variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.config import _setting_path
from cluster.errors import ConfigError
from tests.k8s.view import Doc, Pod, View

# Made by KubeRay or Kubernetes, or by whoever runs the Gateway.
GIVEN = {"ConfigMap": {"kube-root-ca.crt": {"ca.crt"}}, "Secret": {"easel-gateway-tls": {"tls.crt", "tls.key"}}}
# KubeRay's fixed name (controllers/ray/utils/constant.go, RAY_AUTH_TOKEN_SECRET_KEY).
AUTH_KEY = "auth_token"


def problems(view: View) -> Iterator[str]:
    """Every name that leads nowhere, and every Secret's key that nothing reads."""
    have = _provided(view)
    asked = list(_asked(view))
    for owner, kind, name, key in asked:
        if name not in have[kind]:
            yield f"{owner}: no {kind} {name}"
        elif key is not None and key not in have[kind][name]:
            yield f"{owner}: {kind} {name} has no key {key}, only {sorted(have[kind][name])}"
    read = {(name, key) for _, kind, name, key in asked if kind == "Secret"}
    for name, keys in have["Secret"].items():
        yield from (
            f"Secret {name}: nothing reads {key}"
            for key in keys
            if (name, key) not in read and name not in GIVEN["Secret"]
        )
    for pod in view.pods():
        yield from _volumes(view, pod)
        yield from _script(view, pod)
        yield from _settings_in(pod)


def _provided(view: View) -> dict[str, dict[str, set[str]]]:
    have: dict[str, dict[str, set[str]]] = {kind: dict(names) for kind, names in GIVEN.items()}
    for doc in view.of("Secret", "ConfigMap"):
        keys = {*doc.get("data", {}), *doc.get("stringData", {})}
        have[doc["kind"]][doc["metadata"]["name"]] = keys
    for doc in view.of("ExternalSecret"):
        have["Secret"][doc["spec"]["target"]["name"]] = {entry["secretKey"] for entry in doc["spec"]["data"]}
    return have


def _asked(view: View) -> Iterator[tuple[str, str, str, str | None]]:
    """(who, kind, name, key or None) of every Secret and ConfigMap that is read."""
    options = view.cluster.get("authOptions", {})
    yield "authOptions", "Secret", options.get("secretName", ""), AUTH_KEY
    reference = view.cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    yield "gcsFaultToleranceOptions", "Secret", reference["name"], reference["key"]
    for gateway in view.of("Gateway"):
        for listener in gateway["spec"]["listeners"]:
            for certificate in listener["tls"]["certificateRefs"]:
                yield "Gateway", "Secret", certificate["name"], "tls.crt"
    for pod in view.pods():
        for container in pod.containers:
            for entry in container.get("env", []):
                for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                    found = entry.get("valueFrom", {}).get(field)
                    if found and not found.get("optional"):
                        yield pod.owner, kind, found["name"], found["key"]
        for volume in pod.spec.get("volumes", []):
            yield from _asked_by_volume(pod.owner, volume)


def _asked_by_volume(owner: str, volume: Doc) -> Iterator[tuple[str, str, str, str | None]]:
    sources = [volume, *volume.get("projected", {}).get("sources", [])]
    for source in sources:
        for field, kind in (("secret", "Secret"), ("configMap", "ConfigMap")):
            found = source.get(field)
            if found and not found.get("optional"):
                items = [item["key"] for item in found.get("items", [])]
                name = found.get("secretName") or found["name"]
                yield from ((owner, kind, name, key) for key in items or [None])


def _volumes(view: View, pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    owner: Doc = next(
        (d for d in view.of("StatefulSet") if pod.owner == f"StatefulSet/{d['metadata']['name']}"), {"spec": {}}
    )
    claims = {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", [])}
    mounts = [mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])]
    if pod.owner == "head":
        mounts += [mount["name"] for mount in view.cluster["autoscalerOptions"].get("volumeMounts", [])]
    yield from (f"{pod.owner}: no volume {name}" for name in mounts if name not in {*volumes, *claims})
    yield from (f"{pod.owner}: volume {name} is not mounted" for name in {*volumes, *claims} - set(mounts))
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and claim not in view.names("PersistentVolumeClaim"):
            yield f"{pod.owner}: no PersistentVolumeClaim {claim}"
    if pod.spec.get("serviceAccountName") not in view.names("ServiceAccount"):
        yield f"{pod.owner}: no ServiceAccount {pod.spec.get('serviceAccountName')}"
    priority = pod.spec.get("priorityClassName")
    if priority is not None and priority not in view.names("PriorityClass"):
        yield f"{pod.owner}: no PriorityClass {priority}"


def _script(view: View, pod: Pod) -> Iterator[str]:
    """That a shell script gets every variable it uses, and uses every one it gets."""
    container = pod.containers[0]
    command = container.get("command", [])
    if command[:1] != ["/bin/sh"]:
        return
    text = _script_of(view, pod, container)
    if text is None:
        yield f"{pod.owner}: no script {command[1]}"
        return
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", code))
    made = set(re.findall(r"^\s*([A-Z][A-Z0-9_]*)=", code, re.M))
    given = {entry["name"] for entry in container.get("env", [])}
    yield from (f"{pod.owner}: the script uses {name}, which is not set" for name in sorted(used - made - given))
    yield from (f"{pod.owner}: the script does not use {name}" for name in sorted(given - used))


def _script_of(view: View, pod: Pod, container: Doc) -> str | None:
    command: list[Any] = container["command"]
    if command[1] == "-c":
        return str(container["args"][0])
    folder, _, name = command[1].rpartition("/")
    mount = next((m for m in container["volumeMounts"] if m["mountPath"] == folder), {"name": None})
    volume: Doc = next((v for v in pod.spec["volumes"] if v["name"] == mount["name"]), {})
    config = volume.get("configMap", {}).get("name")
    found = [doc["data"].get(name) for doc in view.of("ConfigMap") if doc["metadata"]["name"] == config]
    return found[0] if found else None


def _settings_in(pod: Pod) -> Iterator[str]:
    for entry in pod.containers[0].get("env", []):
        if entry["name"].startswith("EASEL__"):
            try:
                _setting_path(entry["name"])
            except ConfigError as error:
                yield f"{pod.owner}: {error}"
