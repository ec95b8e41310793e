"""The warden of a local cluster: the process that owns Redis and Ray for as long as the cluster runs.

Started by cluster.embedded with one JSON object on its standard input; reports on a pipe, one JSON object a line:
{"say"}, then {"ready"} or {"error", "reason"}. A redis-server of its own is started again when it dies; when that does
not help, the cluster is stopped. SIGTERM and SIGINT stop everything that was started, in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import grpc
import psutil
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve

from cluster.config import Settings, StateSettings, parse_settings
from cluster.embedded import RAY_DIR_PREFIX, START_TIMEOUT_S, LocalCluster, record, record_path
from cluster.errors import ConfigError, EaselError, StartupError, Unavailable
from cluster.jobs.connection import connect_to, without_password
from cluster.jobs.store import JobStore
from cluster.redis_keeper import keep_running
from cluster.redis_server import RedisServer
from deployments.app import application
from deployments.placement import without_place
from deployments.start_failures import messages, reason

logger = logging.getLogger(__name__)

APP_NAME = "easel"
OBJECT_STORE_BYTES = 100 * 2**20
POLL_S = 0.2
# Nobody adds nodes to a local cluster: what has no place soon will have none.
PLACE_TIMEOUT_S = 5.0
SERVE_LOG_LEVEL = "WARNING"


@dataclass(frozen=True, slots=True)
class Orders:
    """What the warden was told to run."""

    settings: Settings
    own_redis: bool
    home: Path


class Reports:
    """The pipe to whoever started the warden; it may go away at any time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def send(self, **message: Any) -> None:  # noqa: ANN401 - JSON
        """Write one report."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing more will be reported."""
        with contextlib.suppress(OSError):
            self._stream.close()


class Interrupted(Exception):
    """The warden was told to stop while it was starting."""


def main() -> int:
    """Run a local cluster until told to stop; the exit status is 1 when it could not start."""
    arguments = json.load(sys.stdin)
    reports = Reports(os.fdopen(arguments["report_fd"], "w", encoding="utf-8"))
    orders = Orders(parse_settings(arguments["settings"]), bool(arguments["own_redis"]), Path(arguments["home"]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    _handle_signals(stop)
    with contextlib.ExitStack() as owned:
        try:
            cluster, redis = _start(orders, reports, owned, stop)
        except Interrupted:
            return 1
        except EaselError as error:
            reports.send(error=str(error), reason=error.reason)
            return 1
        reports.send(ready=asdict(cluster))
        reports.close()
        return _watch(cluster, redis, stop)


def _watch(cluster: LocalCluster, redis: RedisServer | None, stop: threading.Event) -> int:
    """Keep Redis running until the warden is told to stop; returns its exit code."""
    try:
        if redis is None:
            stop.wait()
        else:
            keep_running(redis, stop, lambda: record(replace(cluster, redis_pid=redis.pid)))
    except StartupError as error:
        logger.error("stopping the cluster: %s", error)  # noqa: TRY400 - one line says all
        return 1
    logger.info("stopping")
    return 0


def _start(
    orders: Orders, reports: Reports, owned: contextlib.ExitStack, stop: threading.Event
) -> tuple[LocalCluster, RedisServer | None]:
    settings, redis = _start_redis(orders, reports, owned)
    ray_dir = _start_ray(settings, reports, owned, stop)
    _deploy(settings, reports, stop)
    _until_serving(settings, stop)
    cluster = LocalCluster(
        pid=os.getpid(),
        born_s=psutil.Process().create_time(),
        address=f"{settings.router.host}:{settings.router.port}",
        redis_url=settings.state.url,
        redis_pid=None if redis is None else redis.pid,
        checkpoint=settings.checkpoint,
        log_dir=str(orders.home / "logs"),
        ray_dir=ray_dir,
        ray_address=ray.get_runtime_context().gcs_address,
        metrics_address=_metrics_address(),
    )
    record(cluster)
    owned.callback(lambda: record_path().unlink(missing_ok=True))
    return cluster, redis


def _metrics_address() -> str:
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def _start_redis(orders: Orders, reports: Reports, owned: contextlib.ExitStack) -> tuple[Settings, RedisServer | None]:
    state = orders.settings.state
    if not orders.own_redis:
        reports.send(say=f"using Redis at {without_password(state.url)}")
        asyncio.run(_reach_redis(state))
        return orders.settings, None
    reports.send(say="starting Redis")
    folder = orders.home / "redis"
    shutil.rmtree(folder, ignore_errors=True)  # the jobs of a cluster that was stopped are over
    folder.mkdir(parents=True)
    server = RedisServer(folder)
    server.start()
    owned.callback(server.stop)
    values = orders.settings.model_dump(mode="json")
    values["state"]["url"] = server.url
    return parse_settings(values), server


async def _reach_redis(state: StateSettings) -> None:
    """Raises StartupError for a Redis that cannot be reached, ConfigError for one that these settings do not open."""
    where = f"state.url: Redis at {without_password(state.url)}"
    try:
        store = JobStore(connect_to(state), namespace=state.namespace)
        try:
            await store.ping()
        finally:
            await store.close()
    except Unavailable as error:
        raise StartupError(f"{where} cannot be reached ({error}); start it, or leave --redis-url out") from None
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from None


def _start_ray(settings: Settings, reports: Reports, owned: contextlib.ExitStack, stop: threading.Event) -> str:
    """Start Ray and Serve; returns Ray's own folder."""
    reports.send(say="starting Ray")
    denoiser, router = settings.denoiser, settings.router
    ranks = denoiser.most_replicas * denoiser.tp
    wanted_cpus = ranks * denoiser.num_cpus + router.most_replicas * router.num_cpus
    # Ray's own folder holds sockets, whose paths must be short: not under the state folder.
    folder = tempfile.mkdtemp(prefix=RAY_DIR_PREFIX)
    owned.callback(shutil.rmtree, folder, ignore_errors=True)
    ray.init(
        num_cpus=max(psutil.cpu_count() or 1, int(wanted_cpus) + 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=folder,
    )
    owned.callback(ray.shutdown)
    _handle_signals(stop)  # ray.init put its own in place
    missing = without_place(denoiser, PLACE_TIMEOUT_S)
    if missing:
        raise StartupError("; ".join(missing))
    serve.start(proxy_location="Disabled", logging_config={"log_level": SERVE_LOG_LEVEL})
    owned.callback(serve.shutdown)
    return folder


def _deploy(settings: Settings, reports: Reports, stop: threading.Event) -> None:
    """Deploy and wait until every replica runs; says how far it is. Raises StartupError when Serve gives up."""
    reports.send(say=f"loading {settings.checkpoint} into {settings.denoiser.least_replicas} replicas")
    app = application(settings)
    deployed = _beside(lambda: serve.run(app, name=APP_NAME, route_prefix=None))
    give_up_s = time.monotonic() + START_TIMEOUT_S
    said = ""
    while not _done(deployed, POLL_S) and not stop.is_set() and time.monotonic() < give_up_s:
        said = _say_progress(reports, said)
    _result(deployed, stop)


def _beside(work: Callable[[], object]) -> Future[object]:
    """Run in a daemon thread: unlike an executor's, it does not hold the process up when it hangs."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="deploy", daemon=True).start()
    return future


def _done(future: Future[Any], timeout_s: float) -> bool:
    try:
        future.exception(timeout_s)
    except FutureTimeout:
        return False
    return True


def _result(deployed: Future[Any], stop: threading.Event) -> None:
    if stop.is_set():
        raise Interrupted
    if not deployed.done():
        raise StartupError(f"the replicas were not ready within {START_TIMEOUT_S:.0f} s")
    error = deployed.exception()
    if error is not None:
        said = "\n".join(messages(APP_NAME).values()) or str(error)
        logger.error("Serve could not deploy: %s", said, exc_info=error)
        raise StartupError(reason(said))


def _say_progress(reports: Reports, said: str) -> str:
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return said
    counts = []
    for name, deployment in sorted(application.deployments.items()):
        states = deployment.replica_states
        ready = sum(count for state, count in states.items() if state == "RUNNING")
        counts.append(f"{name} {ready}/{sum(states.values())}")
    line = "replicas ready: " + ", ".join(counts)
    if counts and line != said:
        reports.send(say=line)
    return line


def _until_serving(settings: Settings, stop: threading.Event) -> None:
    """Wait for the health service: a router serves once a replica has registered."""
    port = settings.router.port if settings.router.health_port is None else settings.router.health_port
    target = f"{settings.router.host}:{port}"
    give_up_s = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # ships no type information for its methods
        while time.monotonic() < give_up_s:
            if stop.is_set():
                raise Interrupted
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=POLL_S * 5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(POLL_S / 4)
    raise StartupError(f"the router at {target} did not serve within {START_TIMEOUT_S:.0f} s")


def _handle_signals(stop: threading.Event) -> None:
    def told(signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        stop.set()

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)


if __name__ == "__main__":
    sys.exit(main())
