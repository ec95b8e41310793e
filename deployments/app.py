"""The composition root that Ray Serve imports: `build` makes the application, the classes run it."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.checkpoint import check_degree, read_checkpoint
from cluster.config import RouterSettings, Settings, environment_values, overlay, parse_settings
from cluster.telemetry.logs import log_lines
from cluster.telemetry.telemetry import FLUSH_S, Telemetry, make_telemetry
from deployments.engine.api import Engine
from deployments.placement import DENOISER, placement_options
from deployments.placement_watch import PlacementWatch
from deployments.ray_metrics import RayRecorder
from deployments.replica import Replica
from deployments.router import LEAVING_S, Router
from deployments.scaling import Waker, denoiser_count, open_connections, router_count
from deployments.tokenizer import Tokenizer

if TYPE_CHECKING:
    from deployments.ranks import RankActors

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
CLOSE_SLACK_S = 5.0


def make_engine(settings: Settings, ranks: RankActors | None) -> Engine:
    """The engine that the settings name, loaded and ready; `ranks` are the others where it has several.

    Raises CheckpointError, ConfigError or EngineError.
    """
    folder = Path(settings.checkpoint)
    denoiser = settings.denoiser
    if denoiser.engine == "fake":
        from deployments.engine.fake import FakeEngine  # noqa: PLC0415 - only who asks for an engine imports it

        return FakeEngine(
            read_checkpoint(folder).card,
            slots=denoiser.slots,
            steps_per_canvas=denoiser.fake_steps_per_canvas,
            step_time_ms=denoiser.fake_step_ms,
        )
    if denoiser.engine == "vllm":
        from deployments.vllm_start import vllm_engine  # noqa: PLC0415

        return vllm_engine(settings)
    chosen: dict[str, Any] = {
        "slots": denoiser.slots,
        "dtype": denoiser.dtype,
        "device": denoiser.device,
        "threads": denoiser.threads,
        "max_context_tokens": denoiser.max_context_tokens,
        "prefix_reuse": denoiser.prefix_reuse,
        "cuda_graphs": denoiser.cuda_graphs,
        "prefill_tiles_per_step": denoiser.prefill_tiles_per_step,
    }
    if ranks is not None:
        return ranks.lead(**chosen)
    from deployments.engine.torch_tp.engine import load_engine  # noqa: PLC0415 - torch is imported where it runs

    return load_engine(folder, **chosen)


def rank_actors(settings: Settings) -> RankActors | None:
    """Those of the replica that asks, from its own process; None when it is all there is."""
    group = ray.util.get_current_placement_group()
    if settings.denoiser.tp == 1 or group is None or settings.denoiser.engine != "torch":
        return None
    from deployments.ranks import RankActors  # noqa: PLC0415 - it imports torch

    return RankActors(settings, group)


class DenoiserDeployment:
    """A Denoiser replica under Serve: placed, health-checked, restarted and drained by it."""

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = parse_settings(values)
        log_lines(settings.log_level, settings.log_format, _own_name("denoiser"))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        # Loading takes up to minutes for a large model; Serve's own calls must be answered meanwhile.
        self._ranks = rank_actors(settings)
        engine = await loop.run_in_executor(None, make_engine, settings, self._ranks)
        name = _own_name("denoiser")
        self._telemetry = make_telemetry(
            settings.telemetry.traces, RayRecorder(), process=name, service="easel-denoiser"
        )
        self._replica = Replica(
            settings,
            engine,
            Tokenizer(Path(settings.checkpoint)).decode,
            name=name,
            advertised_host=_reachable(settings.denoiser.host),
            telemetry=self._telemetry,
        )
        await self._replica.start()
        self._replica.load.start_s = loop.time() - began_s
        _at_exit(self._replica.drain, loop, _denoiser_leaves_within_s(settings), self._telemetry)

    async def check_health(self) -> None:
        """Serve's question every HEALTH_PERIOD_S; an error has the replica replaced."""
        self._replica.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's question every few seconds, where it scales."""
        return await self._replica.load.read()

    async def wake(self) -> None:
        """A router's call while there is no replica; that it was answered says that there is one."""

    async def __del__(self) -> None:
        await self._replica.close()
        if self._ranks is not None:
            self._ranks.close()
        await asyncio.to_thread(self._telemetry.tracer.close, FLUSH_S)


class RouterDeployment:
    """A Router replica under Serve. It takes no calls from Serve: its own gRPC server does."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: Mapping[str, Any], denoisers: DeploymentHandle[Any]
    ) -> None:
        settings = parse_settings(values)
        log_lines(settings.log_level, settings.log_format, _own_name("router"))
        self._watch = PlacementWatch(serve.get_replica_context().app_name)
        self._watch.begin()
        # It tells Serve that both deployments are one application, and wakes the first replica. No job goes over it.
        self._waker = Waker(partial(_wake, denoisers))
        name = _own_name("router")
        self._telemetry = make_telemetry(settings.telemetry.traces, RayRecorder(), process=name, service="easel-router")
        self._router = Router(
            settings,
            name=name,
            pending=self._watch.lines,
            on_view=self._waker.look if settings.denoiser.least_replicas == 0 else None,
            telemetry=self._telemetry,
        )
        self.port = await self._router.start()
        _at_exit(self._router.close, asyncio.get_running_loop(), _router_leaves_within_s(settings), self._telemetry)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's question every few seconds, where it scales."""
        connections = await asyncio.get_running_loop().run_in_executor(None, open_connections, self.port)
        return {"connections": connections}

    async def __del__(self) -> None:
        self._watch.close()
        await self._waker.close()
        await self._router.close()
        await asyncio.to_thread(self._telemetry.tracer.close, FLUSH_S)


def build(values: Mapping[str, Any]) -> serve.Application:
    """The Serve application for a mapping of settings, below those of the environment: what a RayService names.

    Raises ConfigError, CheckpointError.
    """
    return application(parse_settings(overlay(values, environment_values())))


def application(settings: Settings) -> serve.Application:
    """The Serve application for checked settings. Raises ConfigError, CheckpointError."""
    # The model need not be where the application is made; routers and replicas read it where they run.
    if Path(settings.checkpoint).is_dir():
        check_degree(read_checkpoint(settings.checkpoint).config, settings.denoiser.tp)
    plain = settings.model_dump(mode="json")
    denoiser: serve.Deployment = serve.deployment(  # type: ignore[assignment]  # its overloads miss this form
        DenoiserDeployment,
        name=DENOISER,
        **denoiser_count(settings.denoiser),
        **placement_options(settings.denoiser),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_denoiser_leaves_within_s(settings),
    )
    router: serve.Deployment = serve.deployment(  # type: ignore[assignment]
        RouterDeployment,
        name="Router",
        **router_count(settings.router),
        **_router_options(settings.router),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_router_leaves_within_s(settings),
    )
    return router.bind(plain, denoiser.bind(plain))


def _router_options(router: RouterSettings) -> dict[str, Any]:
    """The options of the Serve deployment that say where routers run."""
    actor: dict[str, Any] = {"num_cpus": router.num_cpus}
    if router.label_selector:
        actor["label_selector"] = dict(router.label_selector)
    spread = {} if router.max_per_node is None else {"max_replicas_per_node": router.max_per_node}
    return {"ray_actor_options": actor, **spread}


async def _wake(denoisers: DeploymentHandle[Any]) -> None:
    await denoisers.wake.remote()


def _denoiser_leaves_within_s(settings: Settings) -> float:
    """What a drain takes at most: giving jobs back, and leaving the slot table."""
    return 2 * settings.denoiser.drain_timeout_s + CLOSE_SLACK_S


def _router_leaves_within_s(settings: Settings) -> float:
    return settings.router.drain_timeout_s + LEAVING_S + CLOSE_SLACK_S


def _at_exit(
    leave: Callable[[], Coroutine[Any, Any, None]],
    loop: asyncio.AbstractEventLoop,
    timeout_s: float,
    telemetry: Telemetry,
) -> None:
    """Have a process that gets SIGTERM leave in order.

    Ray answers the signal by ending the process, and Serve hears of it too late to call `__del__`. User code runs
    beside the main thread and can handle no signal, but its loop still runs while Python exits.
    """

    def at_exit() -> None:
        if loop.is_running():
            wait((asyncio.run_coroutine_threadsafe(leave(), loop),), timeout=timeout_s)
        telemetry.tracer.close(FLUSH_S)

    atexit.register(at_exit)


def _reachable(host: str) -> str:
    """The address that others dial for a server bound to `host`: this node's own where it is bound to all."""
    if host == "0.0.0.0":
        return str(ray.util.get_node_ip_address())
    return host


def _own_name(role: str) -> str:
    """A name for this process that no later one gets: Serve's id of the replica."""
    return f"{role}-{serve.get_replica_context().replica_id.unique_id}"
