"""What `easel up` makes of its options, and what it reads back of a cluster, without starting one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import embedded
from cluster.config import Settings
from cluster.errors import ConfigError, StartupError
from cluster.redis_server import HOST


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EASEL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, bool]]:
    """What would have been started."""
    seen: list[tuple[Settings, bool]] = []

    def start(settings: Settings, *, own_redis: bool, report: embedded.Report) -> None:
        seen.append((settings, own_redis))

    monkeypatch.setattr(embedded, "start", start)
    return seen


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((HOST, 0))
        taken.listen()
        yield taken


def this_cluster() -> embedded.LocalCluster:
    """A record whose warden is this very process."""
    return embedded.LocalCluster(
        pid=os.getpid(),
        born_s=psutil.Process().create_time(),
        address="127.0.0.1:1",
        redis_url="redis://127.0.0.1:2/0",
        redis_pid=None,
        checkpoint="",
        log_dir="",
        ray_dir="",
        ray_address="127.0.0.1:3",
    )


def test_the_number_of_routers_is_a_setting(started: list[tuple[Settings, bool]]) -> None:
    embedded.up(embedded.UpOptions(routers=2, replicas=3), print)
    embedded.up(embedded.UpOptions(), print)
    (many, own), (default, _) = started
    assert (many.router.replicas, many.denoiser.replicas, own) == (2, 3, True)
    assert default.router.replicas == 1


def test_bounds_for_the_number_of_replicas_turn_autoscaling_on(started: list[tuple[Settings, bool]]) -> None:
    embedded.up(embedded.UpOptions(min_replicas=0, max_replicas=3), print)
    embedded.up(embedded.UpOptions(max_replicas=3), print)
    embedded.up(embedded.UpOptions(), print)
    bounds = [(settings.denoiser.least_replicas, settings.denoiser.most_replicas) for settings, _ in started]
    assert bounds == [(0, 3), (1, 3), (2, 2)]


def test_a_least_number_of_replicas_needs_a_most() -> None:
    with pytest.raises(ConfigError, match=r"denoiser\.autoscaling\.max_replicas: must be set"):
        embedded.up(embedded.UpOptions(min_replicas=1), print)


def test_a_redis_url_means_no_redis_of_its_own(started: list[tuple[Settings, bool]]) -> None:
    embedded.up(embedded.UpOptions(redis_url="redis+sentinel://host:1/easel/0"), print)
    ((settings, own),) = started
    assert (settings.state.url, own) == ("redis+sentinel://host:1/easel/0", False)


def test_no_routers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.replicas: 0 is not allowed"):
        embedded.up(embedded.UpOptions(routers=0), print)


def test_a_listener_that_shares_its_port_is_seen(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(StartupError, match=f"port {port} on {HOST} cannot be used"):
        embedded.up(embedded.UpOptions(port=port), print)


def test_a_record_is_read_back_as_written() -> None:
    embedded.record(this_cluster())
    assert embedded.current() == this_cluster()


def test_only_its_owner_can_read_a_record(home: Path) -> None:
    embedded.record(this_cluster())
    assert (home / "local.json").stat().st_mode & 0o777 == 0o600


def test_a_record_of_another_version_is_no_cluster(home: Path) -> None:
    embedded.record(this_cluster())
    written = json.loads((home / "local.json").read_text())
    for changed in ({**written, "colour": "red"}, {k: v for k, v in written.items() if k != "ray_address"}, [written]):
        (home / "local.json").write_text(json.dumps(changed))
        assert embedded.current() is None


def test_a_record_whose_warden_is_another_process_by_now_is_no_cluster(home: Path) -> None:
    embedded.record(this_cluster())
    written = json.loads((home / "local.json").read_text())
    (home / "local.json").write_text(json.dumps({**written, "born_s": written["born_s"] - 60}))
    assert embedded.current() is None


def test_an_error_of_the_warden_keeps_its_kind() -> None:
    assert isinstance(embedded._as_error("no", "BAD_CONFIG"), ConfigError)
    assert isinstance(embedded._as_error("no", "UNAVAILABLE"), StartupError)
