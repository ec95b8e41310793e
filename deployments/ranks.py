"""The ranks of a replica under Ray: rank 0 is the replica itself, every other one is an actor with a bundle of its own.

An actor is owned by its replica's process: when that dies, however it does, Ray ends the actor. The group of ranks ends
sooner, because a rank finds its connections closed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import __version__
from cluster.checkpoint import check_degree, read_checkpoint
from cluster.config import Settings
from cluster.errors import ConfigError, EaselError, EngineError
from deployments.engine.api import Engine
from deployments.engine.torch_tp.ranks import Meeting, Rendezvous, follow_rank, lead_rank
from deployments.placement import rank_options

LOOPBACK = "127.0.0.1"
# A late rank shows as a broken group before the watchdog gives the step up, which would leave a thread in the engine.
GROUP_SHARE_OF_STEP = 0.75
# Ray tells of a dead process a moment after its connections have closed.
TOLD_S = 2.0
MAX_REASON_CHARS = 400


class Rank:
    """Rank 1 or above of one replica."""

    def follow(
        self, folder: str, rendezvous: Rendezvous, rank: int, settings: dict[str, Any], lead_version: str
    ) -> None:
        """The rank's whole life; see `follow_rank`. Raises ConfigError where the lead's Easel is of another version:
        its `settings` may mean something else here."""
        if lead_version != __version__:
            raise ConfigError(
                f"Easel is {__version__} on its node {ray.util.get_node_ip_address()} and {lead_version} on that of "
                "rank 0; all nodes must have the same version"
            )
        follow_rank(folder, rendezvous, rank=rank, **settings)


class RankActors:
    """Starts ranks 1 and above in bundles 1 and above of a replica's placement group, and ends them."""

    def __init__(self, settings: Settings, group: PlacementGroup) -> None:
        self._settings = settings
        self._group = group
        self._actors: list[Any] = []
        self._runs: list[Any] = []

    def lead(self, **settings: Any) -> Engine:  # noqa: ANN401 - the fields of EngineSettings, and threads
        """Start the ranks and be rank 0; returns when all are ready.

        Raises ConfigError or CheckpointError, EngineError when a rank does not come or cannot load.
        """
        folder, denoiser = self._settings.checkpoint, self._settings.denoiser
        check_degree(read_checkpoint(folder).config, denoiser.tp)
        meeting = Meeting(
            LOOPBACK if denoiser.placement == "strict_pack" else ray.util.get_node_ip_address(),
            denoiser.tp,
            step_timeout_s=denoiser.step_timeout_s * GROUP_SHARE_OF_STEP,
            check=self._check,
        )
        try:
            self._start(meeting.rendezvous, settings)
            return lead_rank(folder, meeting, **settings)
        except (RuntimeError, OSError, RayError) as error:
            trouble = "; ".join(self._ended(TOLD_S)) or str(error)
            raise EngineError(f"the ranks of the replica did not start: {trouble}") from error
        finally:
            meeting.close()

    def close(self) -> None:
        """End the processes. Ray does so too, a little later, when the replica's own ends."""
        for actor in self._actors:
            with suppress(RayError, ValueError):
                ray.kill(actor)

    def _start(self, rendezvous: Rendezvous, settings: dict[str, Any]) -> None:
        denoiser = self._settings.denoiser
        for rank in range(1, denoiser.tp):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            actor: Any = ray.remote(Rank).options(scheduling_strategy=place, **rank_options(denoiser)).remote()
            self._actors.append(actor)
            self._runs.append(actor.follow.remote(self._settings.checkpoint, rendezvous, rank, settings, __version__))

    def _check(self) -> None:
        troubles = self._ended(0)
        if troubles:
            raise EngineError(f"the ranks of the replica did not start: {'; '.join(troubles)}")

    def _ended(self, timeout_s: float) -> list[str]:
        """Of each rank that has ended, its number and why."""
        ended, _ = ray.wait(self._runs, num_returns=1, timeout=timeout_s)
        return [f"rank {self._runs.index(run) + 1}: {_reason(run)}" for run in ended]


def _reason(run: Any) -> str:  # noqa: ANN401 - a reference to what Rank.follow gives
    try:
        ray.get(run)
    except RayTaskError as error:
        cause = error.cause
        said = str(cause) if isinstance(cause, EaselError) else f"{type(cause).__name__}: {cause}"
    except RayError as error:
        # What comes before is ids.
        said = str(error).rpartition("The actor is dead because ")[2]
    else:
        said = "it has ended"
    return " ".join(said.split())[:MAX_REASON_CHARS]
