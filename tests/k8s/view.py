"""Rendered manifests as the tests look at them."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = tuple(sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml")))
RENDER_TIMEOUT_S = 60

Doc = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """As the API server reads: a key that comes twice is an error, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises ConstructorError for a key that is there already."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@functools.cache
def _rendered(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; it renders the manifests")
    line = [kubectl, "kustomize", str(folder)]
    # Rendering needs no cluster; without this a broken kubeconfig of the developer would be read.
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=RENDER_TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


@functools.cache
def _loaded(folder: Path) -> tuple[Doc, ...]:
    return tuple(doc for doc in yaml.load_all(_rendered(folder), StrictLoader) if doc)


def render(folder: Path) -> list[Doc]:
    """The documents of a kustomization, the caller's to change."""
    return copy.deepcopy(list(_loaded(folder)))


def render_overlay(name: str) -> list[Doc]:
    """The documents of an overlay, the caller's to change."""
    return render(K8S / "overlays" / name)


@dataclass(frozen=True)
class Pod:
    """A pod as it will run: `owner` is Kind/name, or the Ray group; `count` the pods at the start."""

    owner: str
    labels: Mapping[str, str]
    spec: Doc
    count: int

    @property
    def containers(self) -> list[Doc]:
        """The containers that the manifest names, the main one first and those that run before it last."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    def port(self, named: str | int) -> int | None:
        """The number of a port by name, or the number itself when a container has it; None when there is none."""
        for container in self.containers:
            for port in container.get("ports", []):
                if named in (port.get("name"), port["containerPort"]):
                    return int(port["containerPort"])
        return None


class View:
    """All documents of one overlay."""

    def __init__(self, docs: list[Doc]) -> None:
        self.docs = docs
        services = self.of("RayService")
        assert len(services) == 1, f"{len(services)} RayServices"
        self.ray = services[0]["spec"]
        self.cluster = self.ray["rayClusterConfig"]
        self.groups: list[Doc] = self.cluster["workerGroupSpecs"]
        self.serve: Doc = yaml.load(self.ray["serveConfigV2"], StrictLoader)

    def of(self, *kinds: str) -> list[Doc]:
        """The documents of these kinds."""
        return [doc for doc in self.docs if doc["kind"] in kinds]

    def names(self, *kinds: str) -> set[str]:
        """The names of the documents of these kinds."""
        return {doc["metadata"]["name"] for doc in self.of(*kinds)}

    @property
    def arguments(self) -> Doc:
        """What the application builder gets."""
        return dict(self.serve["applications"][0]["args"])

    def pods(self) -> Iterator[Pod]:
        """Every kind of pod, those that KubeRay makes included."""
        for doc in self.of("StatefulSet", "Deployment", "Job"):
            template = doc["spec"]["template"]
            labels = template["metadata"]["labels"]
            yield Pod(
                f"{doc['kind']}/{doc['metadata']['name']}", labels, template["spec"], doc["spec"].get("replicas", 1)
            )
        yield self.head()
        for group in self.groups:
            labels = {**_ray_labels("worker"), "ray.io/group": group["groupName"], **group.get("labels", {})}
            count = group["replicas"] * group.get("numOfHosts", 1)
            yield Pod(f"group {group['groupName']}", labels, group["template"]["spec"], count)

    def head(self) -> Pod:
        """The Ray head."""
        spec = self.cluster["headGroupSpec"]
        labels = {**_ray_labels("head"), "ray.io/group": "headgroup", **spec.get("labels", {})}
        return Pod("head", labels, spec["template"]["spec"], 1)

    def pods_with(self, selector: Mapping[str, Any]) -> list[Pod]:
        """The pods that a label selector chooses."""
        return [pod for pod in self.pods() if selects(selector, pod.labels)]


def _ray_labels(node_type: str) -> dict[str, str]:
    """What KubeRay puts on every pod (ray-operator/controllers/ray/common/pod.go, labelPod)."""
    return {"ray.io/node-type": node_type, "ray.io/is-ray-node": "yes", "ray.io/cluster": "easel-x"}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) chooses these labels; an empty one chooses all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        there = labels.get(rule["key"]) in rule.get("values", [])
        known = {"In": there, "NotIn": not there, "Exists": rule["key"] in labels}
        if not known[rule["operator"]]:
            return False
    return True


def quantity(text: str | float) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    text = str(text)
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * units[unit]
    return float(text)
