"""A master, its replica and a Sentinel that watches them: three real processes for the tests of failover."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from cluster.redis_server import HOST, RedisServer, find_redis_server, free_port

SERVICE = "easel"
BOUND_S = 30.0
_LOOK_S = 0.05
_CONFIG = """
port {port}
bind {host}
dir {directory}
logfile {directory}/sentinel.log
sentinel monitor {service} {host} {master} 1
sentinel down-after-milliseconds {service} 500
sentinel failover-timeout {service} 2000
"""


class FailoverSet:
    """Started by `start`; `close` ends all three, whatever state the test left them in."""

    def __init__(self, directory: Path) -> None:
        self.master = RedisServer(directory / "master")
        self.replica = RedisServer(directory / "replica")
        self.sentinel_port = free_port()
        self._directory = directory / "sentinel"
        self._sentinel: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What cluster.jobs.connection.connect takes."""
        return f"redis+sentinel://{HOST}:{self.sentinel_port}/{SERVICE}/0"

    def start(self) -> None:
        """Return when the Sentinel knows the replica, and the replica has what the master has."""
        self.master.start()
        self.replica.start()
        ask(self.replica.port, "REPLICAOF", HOST, self.master.port)
        self._directory.mkdir()
        config = self._directory / "sentinel.conf"
        facts = {"host": HOST, "directory": self._directory, "service": SERVICE}
        config.write_text(_CONFIG.format(port=self.sentinel_port, master=self.master.port, **facts))
        self._sentinel = subprocess.Popen([find_redis_server(), config, "--sentinel"])
        until("the replica to be in step", lambda: role_of(self.replica.port)[3] == b"connected")
        until(
            "the Sentinel to know the replica", lambda: len(ask(self.sentinel_port, "SENTINEL REPLICAS", SERVICE)) == 1
        )

    def replicated(self) -> None:
        """Return when the replica has confirmed everything that the master has accepted."""
        until("the replica to confirm", lambda: ask(self.master.port, "WAIT", 1, 500) == 1)

    def named(self) -> int:
        """The port of the node that the Sentinel names as master."""
        return int(ask(self.sentinel_port, "SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def stop_sentinel(self) -> None:
        """End the Sentinel alone."""
        if self._sentinel is not None:
            self._sentinel.kill()
            self._sentinel.wait(BOUND_S)

    def close(self) -> None:
        """End all of them. SIGKILL: a node may be stopped by a signal, or look for a master that is gone."""
        self.stop_sentinel()
        self.master.kill()
        self.replica.kill()


def ask(port: int, *command: object) -> Any:  # noqa: ANN401 - any reply
    """One command over a connection of its own; raises RedisError."""
    with Redis(host=HOST, port=port, socket_timeout=2.0, protocol=2) as client:
        return client.execute_command(*command)


def role_of(port: int) -> list[Any]:
    """The reply of ROLE: for a replica b"slave", its master's host and port, and the state of the link."""
    return list(ask(port, "ROLE")) + [b""] * 3


def until(what: str, true: Callable[[], bool]) -> None:
    """Wait for `true`, within the bound."""
    give_up_s = time.monotonic() + BOUND_S
    while time.monotonic() < give_up_s:
        try:
            if true():
                return
        except (RedisError, OSError):
            pass
        time.sleep(_LOOK_S)
    raise TimeoutError(f"waited {BOUND_S} s for {what}")
