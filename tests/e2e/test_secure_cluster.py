"""`easel up` with all of docs/security.md turned on: TLS outside and inside, keys, quotas. Used by the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.redis_server import free_port
from tests.certificates import Authority
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command

KEYS: dict[str, str] = {}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    home = tmp_path_factory.mktemp("home")
    easel, ours = Command(home), Authority()
    ca_file = ours.write(home / "ca.pem")
    for name, mark in (("acme", ()), ("ops", ("--admin",))):
        KEYS[name] = easel.json("keys", "new", "--tenant", name, "--file", str(home / "keys"), *mark)["key"]
    settings = {
        "denoiser": {"engine": "fake", "slots": 2},
        "security": {
            "tls": ours.issue("router").write(home, "public"),
            "internal_tls": ours.issue("cluster", "easel-internal").write(home, "internal") | {"ca_file": ca_file},
            "api_keys_file": str(home / "keys"),
            "quotas": {"default": {"running_canvases": 1, "requests_per_s": 0.01, "burst": 2}},
        },
    }
    (home / "easel.yaml").write_text(json.dumps(settings))  # JSON is YAML
    words = ("--config", str(home / "easel.yaml"), "--port", str(free_port()), "--replicas", "1")
    up = easel("up", *words, timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    yield easel
    down = easel("down", timeout_s=120)
    assert down.returncode == 0, down.stderr


def test_a_whole_cluster_works_behind_tls_keys_and_quotas(secured: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = secured("status")
    assert (refused.returncode, "no cluster answers" in refused.stderr) == (3, True)
    monkeypatch.setenv("EASEL_CA_FILE", str(secured.home / "ca.pem"))
    refused = secured("status")
    assert refused.returncode == 2
    assert "EASEL_API_KEY" in refused.stderr
    monkeypatch.setenv("EASEL_API_KEY", KEYS["acme"])
    job = secured.json("generate", "count 31 to 34", "--seed", "1")
    assert secured.json("get", job["job_id"])["tenant"] == "acme"
    assert secured.json("status")["replicas"] == []
    assert secured("generate", "count 31 to 34").returncode == 0
    beyond = secured("generate", "count 31 to 34")
    assert beyond.returncode == 3
    assert "security.quotas: requests_per_s" in beyond.stderr
    assert secured("drain", "denoiser-x").returncode == 2
    monkeypatch.setenv("EASEL_API_KEY", KEYS["ops"])
    assert len(secured.json("status")["replicas"]) == 1
    assert secured("get", job["job_id"]).returncode == 1
    written = "".join(path.read_text(errors="replace") for path in Path(secured.home / "logs").rglob("*.log"))
    assert not [key for key in KEYS.values() if key in written]
