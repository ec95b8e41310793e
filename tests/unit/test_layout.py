"""The direction of dependencies is part of the design: control plane below, engines apart, one composition root."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for top in ("cluster", "deployments", "benchmarks", "models")
    for path in (ROOT / top).rglob("*.py")
    if "easel" not in path.relative_to(ROOT).parts
)

# What the modules under a path may import of this project. The longest matching path counts.
ALLOWED = {
    "cluster/__init__": (),
    "cluster/core": (),
    "cluster/errors": ("cluster.core",),
    "cluster/engines": (),
    "cluster/security": ("cluster.core", "cluster.errors", "cluster.security"),
    "cluster/config": ("cluster.core", "cluster.engines", "cluster.errors", "cluster.security.settings"),
    "cluster/json_fields": ("cluster.core", "cluster.errors"),
    "cluster/weight_files": ("cluster.core", "cluster.errors", "cluster.json_fields"),
    "cluster/checkpoint": ("cluster.core", "cluster.errors", "cluster.json_fields", "cluster.weight_files"),
    "cluster/redis_server": ("cluster.core", "cluster.errors", "cluster.config"),
    "cluster/policy": ("cluster.core", "cluster.errors", "cluster.config", "cluster.policy"),
    "cluster/telemetry": ("cluster.core", "cluster.errors", "cluster.config", "cluster.policy", "cluster.telemetry"),
    "cluster/jobs": (
        *("cluster.core", "cluster.errors", "cluster.config", "cluster.policy", "cluster.telemetry"),
        *("cluster.security", "cluster.jobs"),
    ),
    "cluster/rpc": (
        *("cluster.core", "cluster.engines", "cluster.errors", "cluster.config", "cluster.telemetry"),
        *("cluster.security", "cluster.rpc"),
    ),
    "cluster": ("cluster",),
    "deployments/engine/api": ("cluster.core",),
    "deployments/engine/randomness": ("cluster.core",),
    "deployments/engine": ("cluster.core", "cluster.errors", "cluster.checkpoint", "deployments.engine"),
    "deployments": ("cluster", "deployments"),
    "benchmarks": ("cluster", "deployments", "benchmarks", "models"),
    "models": ("models",),
}
HEAVY = {"torch", "vllm", "transformers"}
TORCH_FREE = ("cluster", "deployments/engine/api", "deployments/engine/fake", "deployments/router")
ENVIRONMENT_READER = "cluster/config.py"


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, as a dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rule_for(path: Path) -> tuple[str, ...]:
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    matching = [rule for rule in ALLOWED if name == rule or name.startswith(f"{rule}/")]
    return ALLOWED[max(matching, key=len)]


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    project = ("cluster", "deployments", "benchmarks", "models")
    mine = {module for module in imports_of(path) if within(module, project)}
    version_only = {"cluster.__version__"}
    wrong = {module for module in mine - version_only if not within(module, rule_for(path))}
    assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.relative_to(ROOT).as_posix().startswith(TORCH_FREE)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_control_plane_imports_no_model_library(path: Path) -> None:
    assert not {module for module in imports_of(path) if module.split(".")[0] in HEAVY}


def test_only_the_configuration_reads_the_environment() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in {"cluster", "deployments"}
        and any(word in path.read_text() for word in ("os.environ", "os.getenv"))
    }
    assert readers <= {ENVIRONMENT_READER}


def test_no_file_is_longer_than_400_lines_and_no_function_than_40() -> None:
    long: list[str] = []
    for path in SOURCES:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)} is too long")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 40:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not long
