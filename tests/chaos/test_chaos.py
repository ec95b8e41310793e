"""`easel chaos` as a user runs it: a real cluster, real kills, and nothing lost, repeated, changed or left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN_TIMEOUT_S = 240.0
LONG_RUN_TIMEOUT_S = 3600.0
ALWAYS_KILLED = ("replica", "router", "redis", "freeze", "drain")


def chaos(home: Path, *words: str, timeout_s: float) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the command with its state in a folder of its own; returns its last line as well."""
    kept = {name: value for name, value in os.environ.items() if name != "EASEL_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "chaos", *words],
        env=kept | {"EASEL_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=home,
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert lines[-1].startswith("{"), done.stdout + done.stderr
    return done, json.loads(lines[-1])


def assert_nothing_was_hurt(done: subprocess.CompletedProcess[str], figures: dict[str, Any]) -> None:
    found = {name: figures[name] for name in ("lost", "duplicated", "different", "leaked")}
    assert found == {"lost": 0, "duplicated": 0, "different": 0, "leaked": 0}, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def test_jobs_survive_one_kill_of_every_kind(tmp_path: Path) -> None:
    done, figures = chaos(tmp_path, "--jobs", "24", "--seed", "44", "--kill-every-s", "1", timeout_s=RUN_TIMEOUT_S)
    assert_nothing_was_hurt(done, figures)
    assert figures["jobs"] == 24
    assert all(figures["kills"][kind] for kind in ALWAYS_KILLED), figures
    assert figures["attempts"] > 24, "no kill hit a job"
    assert not (tmp_path / "local.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(LONG_RUN_TIMEOUT_S)
def test_a_thousand_jobs_survive_a_kill_every_two_seconds(tmp_path: Path) -> None:
    done, figures = chaos(tmp_path, "--jobs", "1000", "--seed", "1", timeout_s=LONG_RUN_TIMEOUT_S)
    assert_nothing_was_hurt(done, figures)
    assert sum(figures["kills"].values()) > 30
