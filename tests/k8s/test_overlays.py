"""Every overlay renders, and everything in it fits: schemas, Ray's and KubeRay's rules, our settings, the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s import network_checks, pod_checks, ray_checks, reference_checks, schemas, settings_checks
from tests.k8s.view import K8S, OVERLAYS, View, quantity, render, render_overlay

CRD = K8S.parent.parent / "shared/k8s/crds/ray.io_rayservices.v1.7.0.yaml"
CHECKS = (
    ray_checks.problems,
    settings_checks.problems,
    reference_checks.problems,
    network_checks.problems,
    pod_checks.problems,
)


def problems(view: View) -> Iterator[str]:
    """What is wrong with an overlay. The other checks can read only what has the right shape."""
    shape = list(schemas.problems(view))
    yield from shape
    for check in () if shape else CHECKS:
        yield from check(view)


def test_the_overlays_are_those_that_the_documentation_names() -> None:
    text = (K8S.parent / "docs/operations.md").read_text()
    assert OVERLAYS == ("cpu", "managed-redis", "production", "small", "two-host")
    assert set(OVERLAYS) <= set(re.findall(r"`([a-z-]+)`", text))


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_problem(name: str) -> None:
    assert list(problems(View(render_overlay(name)))) == []


@pytest.mark.parametrize("folder", [K8S / "base"], ids=["base"])
def test_the_base_alone_renders(folder: Path) -> None:
    assert "RayService" in {doc["kind"] for doc in render(folder)}


def test_every_manifest_is_part_of_an_overlay() -> None:
    """A file that no kustomization names is never applied."""
    for kustomization in K8S.rglob("kustomization.yaml"):
        values = yaml.safe_load(kustomization.read_text())
        named = {Path(entry).name for entry in values.get("resources", []) + values.get("configurations", [])}
        named |= {patch["path"] for patch in values.get("patches", [])}
        named |= {
            file.partition("=")[2] or file for part in values.get("configMapGenerator", []) for file in part["files"]
        }
        there = {path.name for path in kustomization.parent.iterdir() if path.is_file()} - {"kustomization.yaml"}
        assert there <= named, kustomization


def test_production_replicas_are_of_four_gpus_and_some_are_on_spot_nodes() -> None:
    view = View(render_overlay("production"))
    by_name = {group["groupName"]: group for group in view.groups}
    assert view.arguments["denoiser"]["tp"] == 4
    assert view.arguments["denoiser"]["autoscaling"]["min_replicas"] > 1
    spot, steady = by_name["denoiser-spot"], by_name["denoiser"]
    assert spot["minReplicas"] == 0
    assert steady["minReplicas"] >= 2
    assert spot["priority"] > steady.get("priority", 0)


def test_the_two_host_overlay_has_a_replica_of_sixteen_ranks_on_two_pods() -> None:
    view = View(render_overlay("two-host"))
    group = view.groups[1]
    assert (group["numOfHosts"], view.arguments["denoiser"]["tp"]) == (2, 16)
    assert (
        group["replicas"] * group["numOfHosts"] == view.pods_with({"matchLabels": {"easel/role": "denoiser"}})[0].count
    )


def test_the_cpu_overlay_asks_for_little_and_no_gpu() -> None:
    view = View(render_overlay("cpu"))
    pods = list(view.pods())
    resources = [container["resources"] for pod in pods for container in pod.containers]
    assert not any("nvidia.com/gpu" in entry.get("limits", {}) for entry in resources)
    assert view.names("Gateway", "PodMonitor", "ExternalSecret") == set()
    assert sum(quantity(entry["requests"]["cpu"]) for entry in resources) <= 3


@pytest.mark.parametrize("file", ["state-sentinel/start-valkey.sh", "state-single/valkey.yaml"])
def test_redis_gives_easel_the_rights_that_the_documentation_lists(file: str) -> None:
    documented = re.search(r"ACL SETUSER easel (.*)", (K8S.parent / "docs/security.md").read_text())
    given = re.search(r"user easel (.*)", (K8S / "components" / file).read_text())
    assert documented is not None
    assert given is not None
    assert given[1] == documented[1].replace("resetkeys ", "").replace(">PASSWORD", ">$PASSWORD")


def test_the_vendored_schema_is_that_of_the_crd() -> None:
    if not CRD.exists():
        pytest.skip("the full CRD lies beside a checkout, not in it")

    def stripped(value: object) -> object:
        if isinstance(value, list):
            return [stripped(part) for part in value]
        if not isinstance(value, dict):
            return value
        return {
            key: {name: stripped(below) for name, below in part.items()} if key == "properties" else stripped(part)
            for key, part in value.items()
            if key != "description"
        }

    crd = yaml.load(CRD.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(entry for entry in crd["spec"]["versions"] if entry["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    assert stripped(schema) == json.loads((schemas.CRDS / "rayservice-v1.json").read_text())
