"""The Serve config of an overlay, deployed on real Ray nodes with the labels of its groups."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import child_environment
from cluster.embedded import session_of

TIMEOUT_S = 240


def test_replicas_run_on_the_nodes_of_their_groups_and_serve(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; it renders the manifests")
    line = [sys.executable, "-m", "tests.k8s.deploy", str(tmp_path)]
    pipe = subprocess.PIPE
    deploying = subprocess.Popen(
        line, stdout=pipe, stderr=pipe, text=True, env=child_environment(), start_new_session=True
    )
    try:
        said, errors = deploying.communicate(timeout=TIMEOUT_S)
    finally:
        # All of Ray is in its session; after an orderly end there is nothing left.
        for process in session_of(deploying.pid):
            process.kill()
        deploying.wait()
    assert deploying.returncode == 0, errors[-4000:] + said[-2000:]
    found = json.loads(next(text for text in said.splitlines() if text.startswith('{"roles"')))
    assert found == {"roles": {"Denoiser": ["denoiser"] * 2, "Router": ["router"]}, "ready": True, "job": "01478"}
