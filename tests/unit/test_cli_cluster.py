"""The commands for those who run a cluster: up, down, status and drain."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace

import pytest

from cluster import embedded
from cluster.errors import StartupError
from tests.unit.commands import at, invoke, local_cluster
from tests.unit.fake_router import Served

pytestmark = pytest.mark.usefixtures("no_local_cluster")


def test_status_shows_the_load(served: Served) -> None:
    shown = at(served, "status").stdout
    assert "1 replica, 3 of 8 slots in use, 1 waiting (at most 1000)" in shown
    view = json.loads(at(served, "status", "--json").stdout)
    assert view["replicas"][0]["replica"] == "r0"
    assert (view["slots"], view["queued"]) == (8, 1)


def test_status_says_between_what_load_brings_the_number_of_replicas(served: Served) -> None:
    served.router.bounds = (0, 3)
    assert "1 replica of 0..3, 3 of 8 slots" in at(served, "status").stdout
    assert json.loads(at(served, "status", "--json").stdout)["max_replicas"] == 3


def test_status_tells_draining_replicas_from_ready_ones_and_names_the_routers(served: Served) -> None:
    first = served.router.replicas[0]
    served.router.drains = False
    served.router.replicas.append(replace(first, replica="r1", draining=True))
    lines = at(served, "status").stdout.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["r0", "ready"], ["r1", "draining"]]
    assert lines[5] == "1 router: router-0"
    assert [row["draining"] for row in json.loads(at(served, "status", "--json").stdout)["replicas"]] == [False, True]


def test_status_says_what_replicas_without_a_place_wait_for(served: Served) -> None:
    assert "pending: 1 replica waits for {GPU: 1}" in at(served, "status").stdout.splitlines()
    assert json.loads(at(served, "status", "--json").stdout)["pending"] == ["1 replica waits for {GPU: 1}"]


def test_drain_waits_until_the_replica_has_left(served: Served) -> None:
    result = at(served, "drain", "r0")
    assert result.exit_code == 0
    assert re.fullmatch(r"drained r0: 3 jobs moved in \d+\.\d s\n", result.stdout)
    assert result.stderr.splitlines() == [
        "draining r0: 3 jobs left",
        "draining r0: 2 jobs left",
        "draining r0: 1 job left",
        "draining r0: 0 jobs left",
    ]
    assert served.router.replicas == []


def test_drain_json_prints_exactly_one_object(served: Served) -> None:
    result = at(served, "drain", "r0", "--json")
    assert result.stderr == ""
    drained = json.loads(result.stdout)
    assert (list(drained), drained["replica"], drained["moved_jobs"]) == (
        ["replica", "moved_jobs", "drain_ms"],
        "r0",
        3,
    )


def test_drain_takes_a_prefix_that_fits_one_replica(served: Served) -> None:
    first = served.router.replicas[0]
    served.router.replicas = [replace(first, replica=name) for name in ("denoiser-ab", "denoiser-ac", "denoiser")]
    result = at(served, "drain", "denoiser-a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "easel: error: replica: is 'denoiser-a', which could be denoiser-ab, denoiser-ac\n"
    assert at(served, "drain", "denoiser").stdout.startswith("drained denoiser: 3 jobs")
    assert at(served, "drain", "denoiser-ab").stdout.startswith("drained denoiser-ab: 3 jobs")
    assert at(served, "drain", "den").stdout.startswith("drained denoiser-ac: 3 jobs")


@pytest.mark.parametrize("name", ["r1", ""])
def test_drain_of_an_unknown_replica_is_one_line_and_exit_1(served: Served, name: str) -> None:
    result = at(served, "drain", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"easel: error: no replica has the id {name!r}; there are r0\n"


def test_drain_says_when_the_wait_was_too_short(served: Served) -> None:
    served.router.drains = False
    result = at(served, "drain", "r0", "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (1, "")
    said = "easel: error: replica r0 has not left after 0.2 s, with 3 jobs on it; it goes on draining"
    assert result.stderr.splitlines()[-1] == said


def test_up_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[embedded.UpOptions] = []

    def up(options: embedded.UpOptions, report: embedded.Report) -> embedded.LocalCluster:
        seen.append(options)
        report("starting")
        return local_cluster("127.0.0.1:9000")

    monkeypatch.setattr(embedded, "up", up)
    chosen = ("--port", "9000", "--replicas", "3", "--routers", "2", "--engine", "fake", "--checkpoint", "m")
    result = invoke("up", *chosen)
    assert result.exit_code == 0
    assert result.stdout.startswith("starting\neasel is up at 127.0.0.1:9000, logs are in /logs\n")
    assert seen == [embedded.UpOptions(checkpoint="m", replicas=3, routers=2, port=9000, engine="fake")]


def test_up_in_the_foreground_takes_the_cluster_down_on_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    downs: list[bool] = []

    def interrupted(cluster: embedded.LocalCluster) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(embedded, "up", lambda options, report: local_cluster("127.0.0.1:9000"))
    monkeypatch.setattr(embedded, "wait_foreground", interrupted)
    monkeypatch.setattr(embedded, "down", lambda report: downs.append(True))
    before = signal.getsignal(signal.SIGTERM)
    result = invoke("up", "--foreground")
    assert (result.exit_code, downs) == (0, [True])
    assert signal.getsignal(signal.SIGTERM) == before


def test_up_in_the_foreground_says_when_the_cluster_ended_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "up", lambda options, report: local_cluster("127.0.0.1:9000"))
    monkeypatch.setattr(embedded, "wait_foreground", lambda cluster: None)
    monkeypatch.setattr(embedded, "down", lambda report: True)
    result = invoke("up", "--foreground")
    assert result.exit_code == 1
    assert result.stderr == "easel: error: the cluster ended by itself; see /logs\n"


def test_up_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def up(options: embedded.UpOptions, report: embedded.Report) -> embedded.LocalCluster:
        raise StartupError("port 8500 on 127.0.0.1 cannot be used")

    monkeypatch.setattr(embedded, "up", up)
    result = invoke("up")
    assert (result.exit_code, result.stderr) == (1, "easel: error: port 8500 on 127.0.0.1 cannot be used\n")


def test_down_without_a_cluster_says_so() -> None:
    result = invoke("down")
    assert (result.exit_code, result.stdout) == (0, "no cluster runs on this machine\n")
