"""Two machines on one: network namespaces with addresses of their own, joined by a veth pair that can be cut.

this process ──── head ════ far          ──── a link for the test itself, never cut
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

KILL_TIMEOUT_S = 10.0
RAY_PORT = 6379


class NotPermitted(Exception):
    """This machine does not let us make network namespaces; the text says why."""


class Namespaces:
    """Owns two namespaces, their links, and every process in them; `close` ends all. Raises NotPermitted."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        if shutil.which("ip") is None:
            raise NotPermitted("iproute2 is not installed")
        mark, net = secrets.token_hex(3), f"198.18.{os.getpid() % 254}"
        self._environment = dict(environment)
        self.head, self.far = f"easel-{mark}-a", f"easel-{mark}-b"
        self._here, self._head_outer, self._head_link, self._far_link = (f"ez{mark}{end}" for end in "0123")
        self.outer_host, self.head_host, self.far_host = f"{net}.2", f"{net}.129", f"{net}.130"
        self._made: list[str] = []
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            for name in (self.head, self.far):
                _ip("netns", "add", name)
                self._made.append(name)
            self._join(net)
        except NotPermitted:
            self.close()
            raise

    def start(self, where: str, *command: str) -> None:
        """A process in a namespace, which ends with it at the latest."""
        line = ["ip", "netns", "exec", where, *command]
        null = subprocess.DEVNULL
        self._started.append(subprocess.Popen(line, env=self._environment, stdout=null, stderr=null))

    def run(self, where: str, *command: str, timeout_s: float) -> None:
        """A command in a namespace that must succeed."""
        line = ["ip", "netns", "exec", where, *command]
        done = subprocess.run(
            line, env=self._environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self) -> None:
        """From now on, nothing passes between the two."""
        _ip("-n", self.far, "link", "set", self._far_link, "down")

    def mend(self) -> None:
        """Joins them again."""
        _ip("-n", self.far, "link", "set", self._far_link, "up")

    def processes(self, where: str) -> list[int]:
        """The ids of those that run in a namespace."""
        return [int(pid) for pid in _ip("netns", "pids", where).split()]

    def end_processes(self, where: str) -> None:
        """Kill everything in a namespace, as a machine that loses power does."""
        give_up_s = time.monotonic() + KILL_TIMEOUT_S
        while (pids := self.processes(where)) and time.monotonic() < give_up_s:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def close(self) -> None:
        """End everything."""
        for name in reversed(self._made):
            self.end_processes(name)
            _ip("netns", "del", name)
        for process in self._started:
            process.wait(KILL_TIMEOUT_S)
        self._made.clear()

    def _join(self, net: str) -> None:
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._head_outer, "netns", self.head)
        _ip("-n", self.head, "link", "add", self._head_link, "type", "veth", "peer", self._far_link, "netns", self.far)
        _ip("addr", "add", f"{net}.1/25", "dev", self._here)
        _ip("link", "set", self._here, "up")
        for name, link, host in (
            (self.head, self._head_outer, self.outer_host),
            (self.head, self._head_link, self.head_host),
            (self.far, self._far_link, self.far_host),
        ):
            _ip("-n", name, "addr", "add", f"{host}/25", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")


def ray_node(host: str, head_host: str, cpus: int, folder: Path) -> list[str]:
    """The command that starts a Ray node and returns when it is up; a head where both hosts are the same."""
    role = [f"--address={head_host}:{RAY_PORT}"]
    if host == head_host:
        role = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
    sizes = [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats"]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host}", *role, *sizes]


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise NotPermitted(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
