"""The image, as far as it can be tested without a container engine: locks, steps, and what KubeRay calls in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"requirements.lock": ("vllm", "otel"), "requirements-cpu.lock": ("otel",)}
# Installing these takes gigabytes; what they need of the image is not tested here.
HEAVY = re.compile(r"^(torch|triton|nvidia-|cuda-)")
STEP_TIMEOUT_S = 900


def name_of(requirement: str) -> str:
    return re.split(r"[\[=<>;! ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def locked(lock: str) -> dict[str, str]:
    """Package -> version; every entry must have a hash."""
    text = (ROOT / lock).read_text()
    entries = re.findall(
        r"^([a-z0-9][a-z0-9._-]*)==([^\s\\]+) \\\n((?:    --hash=sha256:[0-9a-f]{64}[ \\]*\n?)+)", text, re.M
    )
    assert len(entries) == len(re.findall(r"^[a-z0-9].*==", text, re.M))
    return {name: version for name, version, _ in entries}


def project() -> dict[str, list[str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        values = tomllib.load(file)["project"]
    return {"": values["dependencies"], **values["optional-dependencies"]}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_every_dependency_at_the_version_that_the_project_pins(lock: str) -> None:
    have = locked(lock)
    for part in ("", *LOCKS[lock]):
        for requirement in project()[part]:
            assert have.get(name_of(requirement)) == requirement.partition("==")[2], f"{requirement}: run `make lock`"


def test_the_locks_agree_where_both_have_a_package() -> None:
    full, cpu = locked("requirements.lock"), locked("requirements-cpu.lock")
    assert {name: full[name] for name in cpu} == cpu
    assert "vllm" not in cpu


@pytest.mark.slow
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_what_resolving_gives(lock: str) -> None:
    """Given the lock to begin with, resolving changes nothing: all of it fits together, as wheels for the image."""
    extras = [word for extra in LOCKS[lock] for word in ("--extra", extra)]
    where = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_35", "--only-binary", ":all:"]
    line = ["uv", "pip", "compile", "pyproject.toml", *extras, *where, "--constraint", lock, "--no-header", "--quiet"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=STEP_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert dict(re.findall(r"^([a-z0-9._-]+)==(\S+)$", done.stdout, re.M)) == locked(lock)


def test_the_dockerfile_has_no_warning() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed; `make venv` brings it")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_image_runs_as_uid_1000_with_what_kuberay_calls() -> None:
    last = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "USER 1000:1000" in last
    assert re.search(r"useradd --uid 1000 .*--create-home", last)
    installed = re.search(r"apt-get install -y --no-install-recommends (.*) \\", last)
    assert installed is not None
    # The probes and init containers of KubeRay, and Triton, which compiles its launchers.
    assert {"bash", "wget", "openssl", "gcc"} <= set(installed[1].split())
    # `ray` and `python`, in a login shell too.
    assert last.count("/opt/easel/venv/bin:$PATH") == 2


def test_the_image_is_made_of_the_product_alone() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M))
    words = {word for line in copied for word in line.split()} - {"${LOCK}"} | set(LOCKS)
    assert kept == words
    assert all((ROOT / word).exists() for word in words)


@pytest.mark.slow
@pytest.mark.timeout(2 * STEP_TIMEOUT_S)
def test_the_install_steps_make_an_environment_that_works(tmp_path: Path) -> None:
    """The build stage's commands in a fresh Python 3.12; torch comes from elsewhere, because the lock's is for CUDA."""
    python = shutil.which("python3.12")
    if python is None or subprocess.run([python, "-V"], capture_output=True, check=False).returncode:
        pytest.skip("Python 3.12 is not installed")
    steps = subprocess.run([python, "-m", "venv", tmp_path / "venv"], capture_output=True, check=False)
    assert steps.returncode == 0
    text = re.sub(r"\\\n", "\\\\\n", (ROOT / "requirements-cpu.lock").read_text())
    blocks = re.split(r"\n(?=[a-z0-9])", text)
    (tmp_path / "light.lock").write_text("\n".join(block for block in blocks if not HEAVY.match(block)))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cluster", "deployments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    commands = (
        ["pip", "install", "-q", "--require-hashes", "--only-binary", ":all:", "--no-deps", "-r", "light.lock"],
        ["pip", "install", "-q", "--no-deps", "--no-build-isolation", "."],
        ["ray", "--version"],
        ["easel", "config", "--schema"],
        ["python", "-c", "from ray._private.gcs_utils import cleanup_redis_storage; import cluster.jobs.store"],
    )
    for command in commands:
        tool = tmp_path / "venv/bin" / command[0]
        done = subprocess.run(
            [tool, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=STEP_TIMEOUT_S
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
