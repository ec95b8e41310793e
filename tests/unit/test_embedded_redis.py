"""The Redis of a local cluster: one of its own is started again when it dies, one it was given has to let it in."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import embedded
from cluster.errors import ConfigError, StartupError
from cluster.jobs.connection import connect
from cluster.redis_keeper import RedisKeeper, keep_running
from cluster.redis_server import HOST, RedisServer, free_port

BOUND_S = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path / "redis")
    made.start()
    yield made
    made.stop()


async def said(server: RedisServer, *words: str) -> object:
    client = connect(server.url)
    try:
        return await client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    finally:
        await client.aclose()


def kill(server: RedisServer) -> None:
    """As the kernel's out-of-memory killer does: the server's owner hears nothing."""
    os.kill(server.pid, signal.SIGKILL)
    give_up_s = time.monotonic() + BOUND_S
    while server.ended() is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_a_server_that_runs_is_left_alone(server: RedisServer) -> None:
    pid = server.pid
    assert not RedisKeeper(server).look()
    assert server.pid == pid


def test_a_killed_server_is_back_on_its_port_with_what_it_had_accepted(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster.redis_keeper")
    pid, port, keeper = server.pid, server.port, RedisKeeper(server)
    asyncio.run(said(server, "SET", "kept", "yes"))
    kill(server)
    assert keeper.look()
    assert not keeper.look()
    assert server.port == port
    assert server.pid != pid
    assert asyncio.run(said(server, "GET", "kept")) == b"yes"
    assert [record.getMessage() for record in caplog.records] == [
        f"redis-server at {server.url} was killed by SIGKILL; starting it again",
        f"redis-server runs again at {server.url} as process {server.pid}",
    ]


def test_a_server_that_keeps_dying_is_given_up(server: RedisServer) -> None:
    keeper = RedisKeeper(server, tries=2, window_s=60)
    for _ in range(2):
        kill(server)
        assert keeper.look()
    kill(server)
    with pytest.raises(StartupError, match=r"was killed by SIGKILL; 2 starts in 60 s did not help, see .*redis\.log"):
        keeper.look()


def test_deaths_that_lie_apart_are_forgiven(server: RedisServer) -> None:
    keeper = RedisKeeper(server, tries=1, window_s=0.0)
    for _ in range(3):
        kill(server)
        assert keeper.look()


def test_a_start_that_fails_is_tried_again_and_then_given_up(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = RedisKeeper(server, tries=3, window_s=0.0)
    kill(server)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, server.port))
        taken.listen()
        assert not keeper.look()
        assert f"port {server.port} on {HOST} is taken" in caplog.text
    assert keeper.look()
    kill(server)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, server.port))
        taken.listen()
        for _ in range(3):
            assert not keeper.look()
        with pytest.raises(StartupError, match="3 starts did not help"):
            keeper.look()


def test_a_stopped_server_after_a_restart_leaves_no_process(server: RedisServer) -> None:
    kill(server)
    assert RedisKeeper(server).look()
    server.stop()
    assert server.ended() == "ended with exit code 0"
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_the_log_of_the_run_that_died_is_kept(server: RedisServer) -> None:
    assert server.log is not None
    before = server.log.read_text()
    kill(server)
    assert RedisKeeper(server).look()
    assert server.log.read_text().startswith(before)


class Kept:
    """A server that is looked after in a thread, as the warden does it."""

    def __init__(self, server: RedisServer) -> None:
        self.restarts: queue.Queue[int] = queue.Queue()
        self.stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self.end = self._pool.submit(keep_running, server, self.stop, lambda: self.restarts.put(server.pid))

    def close(self) -> None:
        self.stop.set()
        self._pool.shutdown()


@pytest.fixture
def kept(server: RedisServer) -> Iterator[Kept]:
    started = Kept(server)
    yield started
    started.close()


def test_every_restart_is_told_until_the_end(kept: Kept, server: RedisServer) -> None:
    seen = [server.pid]
    for _ in range(2):
        os.kill(server.pid, signal.SIGKILL)
        seen.append(kept.restarts.get(timeout=BOUND_S))
        assert server.pid == seen[-1]
    assert len(set(seen)) == 3
    kept.stop.set()
    assert kept.end.exception(BOUND_S) is None
    assert server.ended() is None


def test_a_server_that_cannot_be_kept_ends_the_wait(
    kept: Kept, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "start", refuse)
    os.kill(server.pid, signal.SIGKILL)
    assert isinstance(kept.end.exception(BOUND_S), StartupError)
    assert kept.restarts.empty()


def refuse(timeout_s: float) -> None:
    raise StartupError("no room")


@pytest.fixture
def guarded(server: RedisServer) -> str:
    """The URL of a Redis that asks for a password, with a wrong one."""
    asyncio.run(said(server, "CONFIG", "SET", "requirepass", "secret"))
    return server.url.replace("//", "//me:hush@")


def up(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_HOME", str(home))
    embedded.up(embedded.UpOptions(redis_url=url, port=0, engine="fake"), print)


def test_a_redis_that_refuses_the_password_is_one_line_that_does_not_tell_it(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        up(guarded, tmp_path, monkeypatch)
    shown = guarded.replace("me:hush@", "***@")
    assert str(caught.value).startswith(f"state.url: Redis at {shown} cannot be used: Redis refuses the credentials")
    assert "\n" not in str(caught.value)
    log = (tmp_path / "logs" / "cluster.log").read_text()
    assert "Traceback" not in log
    assert "hush" not in str(caught.value) + log


def test_sentinels_that_cannot_be_reached_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = f"{HOST}:{free_port()}"
    with pytest.raises(StartupError) as caught:
        up(f"redis+sentinel://:hush@{hosts}/easel/0", tmp_path, monkeypatch)
    where = f"state.url: Redis at redis+sentinel://***@{hosts}/easel/0 cannot be reached"
    assert str(caught.value).startswith(f"{where} (Redis cannot be used now: no Sentinel names a master of 'easel'")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in (tmp_path / "logs" / "cluster.log").read_text()
