"""A whole cluster on one machine: `easel up` starts it, `easel down` stops it, and nothing is left behind.

One process, the warden (deployments.local), owns Redis and Ray. It leads a process session of its own, in which all of
Ray runs, so that what a crash of the warden leaves can be found and ended by its session id.

    easel up ──starts──> warden ──owns──> redis-server
       │ <──reports──┘      └────owns──> Ray ──runs──> Router, Denoiser replicas
       └ returns when the health service says SERVING
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import psutil

from cluster.checkpoint import check_degree, read_checkpoint
from cluster.config import (
    Settings,
    child_environment,
    environment_values,
    load_values,
    overlay,
    parse_settings,
    state_dir,
)
from cluster.errors import ConfigError, EaselError, StartupError
from cluster.redis_server import free_port
from cluster.security.check import check_files

Report = Callable[[str], None]

WARDEN_MODULE = "deployments.local"
DEFAULT_CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "tiny"
RAY_DIR_PREFIX = "easel-ray-"
START_TIMEOUT_S = 180.0
WARDEN_TIMEOUT_S = 3 * START_TIMEOUT_S
STOP_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 5.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `easel up` can be told: a YAML file of settings, and what goes before it. None leaves a default alone.

    Port 0 is a free one.
    """

    config: str | None = None
    checkpoint: str | None = None
    replicas: int | None = None
    tp: int | None = None
    port: int | None = None
    slots: int | None = None
    engine: str | None = None
    dtype: str | None = None
    redis_url: str | None = None
    routers: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running local cluster. `pid` is its warden's, which began at `born_s` (so a reused pid is not taken for it).

    `address` is the routers', `ray_address` where `ray.init(address=...)` attaches, `metrics_address` where Ray's agent
    answers GET /metrics; all are host:port. Ray guards a
    cluster of this kind with a token in the user's home, which an attaching process reads with RAY_AUTH_MODE=token.
    """

    pid: int
    born_s: float
    address: str
    redis_url: str
    redis_pid: int | None
    checkpoint: str
    log_dir: str
    ray_dir: str
    ray_address: str
    metrics_address: str = ""


def up(options: UpOptions, report: Report) -> LocalCluster:
    """Start a cluster as `easel up` does; see `start`."""
    values = chosen_values(options)
    own_redis = not (isinstance(values["state"], dict) and values["state"].get("url"))
    return start(parse_settings(values), own_redis=own_redis, report=report)


def start(settings: Settings, *, own_redis: bool, report: Report) -> LocalCluster:
    """Start a cluster and return when it serves; with `own_redis` the URL in `settings` is replaced by its own server.

    Raises EaselError, having stopped what it started.
    """
    home = state_dir()
    with _only_one(home):
        running = current()
        if running is not None:
            where = f"a cluster already runs here at {running.address} (pid {running.pid})"
            raise StartupError(f"{where}; use it, or stop it with `easel down`")
        _end_leftovers(report)
        check_degree(read_checkpoint(settings.checkpoint).config, settings.denoiser.tp)
        check_files(settings.security)
        _require_free(settings.router.host, settings.router.port)
        return _start_warden(home, _with_probes(settings), own_redis, report)


def down(report: Report) -> bool:
    """Stop the local cluster and everything it started; False when there was none."""
    cluster = current()
    if cluster is None:
        return _end_leftovers(report)
    report(f"stopping the cluster at {cluster.address}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.pid, signal.SIGTERM)
    if not _gone(cluster, STOP_TIMEOUT_S):
        report(f"the cluster did not stop within {STOP_TIMEOUT_S:.0f} s: killing it")
    _end_leftovers(report)
    return True


def current() -> LocalCluster | None:
    """The local cluster that runs, or None."""
    cluster = _recorded()
    return cluster if cluster is not None and _alive(cluster) else None


def wait_foreground(cluster: LocalCluster) -> None:
    """Return when the cluster has ended by itself; Ctrl-C and SIGTERM are the caller's to handle."""
    while _alive(cluster):
        time.sleep(POLL_S)


def record_path() -> Path:
    """Where the warden records the cluster it owns."""
    return state_dir() / "local.json"


def record(cluster: LocalCluster) -> None:
    """Write the record in one move, so that no reader sees half of it; a URL in it can hold a password."""
    path = record_path()
    temporary = path.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(cluster), indent=1))
    temporary.replace(path)


def chosen_values(options: UpOptions) -> dict[str, Any]:
    """The settings that a file, above it the environment, and above both the options give; not yet checked."""
    scaled = {"min_replicas": options.min_replicas, "max_replicas": options.max_replicas}
    given = {
        "checkpoint": options.checkpoint,
        "state": {"url": options.redis_url},
        "router": {"port": options.port, "replicas": options.routers},
        "denoiser": {
            "replicas": options.replicas,
            "slots": options.slots,
            "tp": options.tp,
            "engine": options.engine,
            "dtype": options.dtype,
            # An empty section would turn autoscaling on.
            "autoscaling": scaled if any(bound is not None for bound in scaled.values()) else None,
        },
    }
    from_file = {} if options.config is None else load_values(Path(options.config))
    values = overlay(overlay(from_file, environment_values()), given)
    folder = Path(values.get("checkpoint") or DEFAULT_CHECKPOINT)
    values["checkpoint"] = str(folder.expanduser().resolve())
    if isinstance(values["router"], dict) and values["router"].get("port") == 0:
        values["router"]["port"] = free_port()
    return values


def _with_probes(settings: Settings) -> Settings:
    """The warden asks whether the routers serve; behind TLS it needs a port where it can do so without certificates."""
    if settings.security.tls is None or settings.router.health_port is not None:
        return settings
    return parse_settings(overlay(settings.model_dump(mode="json"), {"router": {"health_port": free_port()}}))


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        # Not SO_REUSEPORT, by which our own routers share the port: with it a foreign listener could go unseen.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"port {port} on {host} cannot be used ({error.strerror})"
            raise StartupError(f"{reason}; free it, or choose another with --port") from None


def _start_warden(home: Path, settings: Settings, own_redis: bool, report: Report) -> LocalCluster:
    log_dir = home / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    reports, theirs = os.pipe()
    arguments = {
        "settings": settings.model_dump(mode="json"),
        "own_redis": own_redis,
        "home": str(home),
        "report_fd": theirs,
    }
    with (log_dir / "cluster.log").open("ab") as log, os.fdopen(reports, encoding="utf-8") as lines:
        warden = subprocess.Popen(
            [sys.executable, "-m", WARDEN_MODULE],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(theirs,),
            env=child_environment(),
            start_new_session=True,
        )
        os.close(theirs)
        _tell(warden, arguments)
        # The warden bounds each part of its start; this bounds a warden that hangs outside of them.
        last_resort = threading.Timer(WARDEN_TIMEOUT_S, warden.kill)
        last_resort.start()
        try:
            return _until_ready(warden, lines, log_dir, report)
        except BaseException:
            _stop_unready(warden)
            raise
        finally:
            last_resort.cancel()


def _tell(warden: subprocess.Popen[bytes], arguments: dict[str, object]) -> None:
    """Through a pipe: everybody on the machine can read a command line, and the settings may hold a password."""
    # A warden that is gone already is noticed by its reports.
    with contextlib.suppress(BrokenPipeError), cast(IO[bytes], warden.stdin) as pipe:
        pipe.write(json.dumps(arguments).encode())


def _until_ready(warden: subprocess.Popen[bytes], lines: IO[str], log_dir: Path, report: Report) -> LocalCluster:
    """Pass the warden's reports on until it is ready."""
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "ready" in message:
            return LocalCluster(**message["ready"])
        if "error" in message:
            raise _as_error(str(message["error"]), message.get("reason"))
        report(message["say"])
    code = warden.wait(KILL_TIMEOUT_S)
    raise StartupError(f"the cluster ended while starting (exit {code}); see {log_dir / 'cluster.log'}")


def _as_error(text: str, reason: object) -> EaselError:
    """The error that the warden reported: a wrong setting stays one, so that the command's exit code says so."""
    return ConfigError(text) if reason == ConfigError.reason else StartupError(text)


def _stop_unready(warden: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        warden.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        warden.wait(STOP_TIMEOUT_S)
    _kill(session_of(warden.pid))


def _recorded() -> LocalCluster | None:
    try:
        return LocalCluster(**json.loads(record_path().read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None  # written by another version; whatever it names has gone with that version's warden


def _alive(cluster: LocalCluster) -> bool:
    return _is_same(cluster.pid, cluster.born_s)


def _is_same(pid: int, born_s: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born_s) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone(cluster: LocalCluster, timeout_s: float) -> bool:
    give_up_s = time.monotonic() + timeout_s
    while _alive(cluster):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(POLL_S)
    return True


def session_of(leader: int) -> list[psutil.Process]:
    """The processes that still run of the session that a warden leads or led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def redis_process(cluster: LocalCluster) -> psutil.Process | None:
    """The cluster's own Redis; None when it has none, or while that is down."""
    if cluster.redis_pid is None:
        return None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(cluster.redis_pid)
        if "redis" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _end_leftovers(report: Report) -> bool:
    """Kill what a warden that is gone, or hangs, left; True when there was anything."""
    cluster = _recorded()
    if cluster is None:
        return False
    redis = redis_process(cluster)
    left = _kill(session_of(cluster.pid)) + _kill([] if redis is None else [redis])
    if left:
        report(f"ended {left} processes that an earlier cluster left")
    if Path(cluster.ray_dir).name.startswith(RAY_DIR_PREFIX):
        shutil.rmtree(cluster.ray_dir, ignore_errors=True)
    record_path().unlink(missing_ok=True)
    return left > 0


def _kill(processes: list[psutil.Process]) -> int:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)
    return len(processes)


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the lock of this home: two `easel up` at once would both find nothing running."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError("another `easel up` is starting a cluster here; wait for it to finish") from None
        yield
