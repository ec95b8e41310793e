"""The server of one machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import StartupError
from cluster.jobs.connection import connect
from cluster.redis_server import HOST, RedisServer

START = """
import sys
from cluster.redis_server import RedisServer
server = RedisServer(sys.argv[1])
server.start()
print(server.pid, server.url)
"""


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on {HOST} is taken") as caught:
            RedisServer(tmp_path, port).start()
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"redis directory .* cannot be made"):
        RedisServer(tmp_path / "file" / "redis").start()


def test_data_that_redis_cannot_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("not an append-only file")
    (tmp_path / "appendonlydir").write_text("not a folder")
    with pytest.raises(StartupError, match=r"redis-server on port \d+ ended at once: .*") as caught:
        RedisServer(tmp_path).start()
    assert "\n" not in str(caught.value)


def test_a_second_start_is_refused(own_server: RedisServer) -> None:
    with pytest.raises(StartupError, match="runs already"):
        own_server.start()


def test_stop_can_be_called_twice_and_before_a_start(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.stop()
    server.start()
    server.stop()
    server.stop()


async def test_it_is_set_up_to_lose_nothing(own_server: RedisServer) -> None:
    client = connect(own_server.url)
    expected = {"appendonly": "yes", "appendfsync": "no", "maxmemory-policy": "noeviction", "bind": HOST}
    assert {name: (await client.config_get(name))[name] for name in expected} == expected
    await client.aclose()


def test_it_outlives_its_parent_and_is_stopped_by_another_process(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path / "redis")], capture_output=True, text=True, check=True
    )
    pid, url = started.stdout.split()
    server = RedisServer.attach(int(pid), url)
    assert os.getsid(int(pid)) == int(pid)
    server.stop()
    with pytest.raises(StartupError, match="nothing answers there"):
        RedisServer.attach(int(pid), url)


def test_a_pid_that_serves_nothing_there_is_not_attached_to(own_server: RedisServer) -> None:
    with pytest.raises(StartupError, match=f"process {own_server.pid} answers there"):
        RedisServer.attach(os.getpid(), own_server.url)
    with pytest.raises(StartupError, match="redis url is"):
        RedisServer.attach(own_server.pid, "redis://elsewhere:1/0")
