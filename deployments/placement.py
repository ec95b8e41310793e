"""Where replicas run: one placement group for each, one bundle of it for each rank; and which replicas wait for room.

Serve makes the group and puts the replica, which is rank 0, into its first bundle. It removes the group with the
replica, and with that everything that still runs in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.config import DenoiserSettings

DENOISER = "Denoiser"
TRIAL = "easel-trial-"
# Ray refuses a bundle that reserves nothing.
LEAST_CPUS = 0.001
UNPLACED = ("PENDING", "RESCHEDULING")
WHERE = {"STRICT_PACK": " on one node", "STRICT_SPREAD": ", each on another node"}

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one replica waits for: `ranks` bundles, each with `resources` as pairs, placed by Ray's `strategy`."""

    ranks: int
    resources: tuple[tuple[str, float], ...]
    strategy: str

    def __str__(self) -> str:
        bundle = _written(dict(self.resources))
        return bundle if self.ranks == 1 else f"{self.ranks} x {bundle}{WHERE.get(self.strategy, '')}"


def rank_options(denoiser: DenoiserSettings) -> dict[str, float]:
    """What a rank reserves, as the options of a Ray actor."""
    return {"num_cpus": denoiser.num_cpus, "num_gpus": denoiser.num_gpus}


def placement_options(denoiser: DenoiserSettings) -> dict[str, Any]:
    """The options of the Serve deployment that say where its replicas run."""
    bundle = {"CPU": denoiser.num_cpus, "GPU": denoiser.num_gpus}
    bundle = {kind: amount for kind, amount in bundle.items() if amount} or {"CPU": LEAST_CPUS}
    own = rank_options(denoiser)
    if denoiser.engine == "vllm" and denoiser.tp > 1:
        # vLLM's ranks are actors of its own, one in each bundle; the replica computes nothing and leaves them the GPUs.
        own["num_gpus"] = 0.0
    options: dict[str, Any] = {
        "ray_actor_options": own,
        "placement_group_bundles": [dict(bundle) for _ in range(denoiser.tp)],
        "placement_group_strategy": denoiser.placement.upper(),
    }
    if denoiser.label_selector:
        options["placement_group_bundle_label_selector"] = [dict(denoiser.label_selector) for _ in range(denoiser.tp)]
    return options


def waiting(app_name: str) -> tuple[str, ...]:
    """Lines on the replicas of an application that have no place at this moment; empty when all have one.

    Asks Ray's tables, and blocks until it answers.
    """
    return _waiting(f"SERVE_REPLICA::{app_name}#{DENOISER}#")


def without_place(denoiser: DenoiserSettings, timeout_s: float) -> tuple[str, ...]:
    """As `waiting`, before there are replicas: reserves a place for those there must be, and gives all back."""
    options, strategy = placement_options(denoiser), denoiser.placement.upper()
    bundles, labels = options["placement_group_bundles"], options.get("placement_group_bundle_label_selector")
    give_up_s = time.monotonic() + timeout_s
    groups = [
        ray.util.placement_group(bundles, strategy, name=f"{TRIAL}{n}", bundle_label_selector=labels)
        for n in range(denoiser.least_replicas)
    ]
    try:
        placed = [group.wait(max(0.0, give_up_s - time.monotonic())) for group in groups]
        return () if all(placed) else _waiting(TRIAL)
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)


def unplaced(groups: Iterable[Mapping[str, Any]], prefix: str) -> list[Wanted]:
    """Of Ray's placement groups, those whose name begins with `prefix` and that wait to be placed, or placed again."""
    return [
        Wanted(len(group["bundles"]), tuple(sorted(group["bundles"][0].items())), group["strategy"])
        for group in groups
        if group["name"].startswith(prefix) and group["state"] in UNPLACED
    ]


def missing(wanted: Iterable[Wanted], nodes: Sequence[Resources], free: Resources) -> tuple[str, ...]:
    """One line for all replicas that want the same: what they wait for, and what the live `nodes` have of it."""
    lines = []
    for want, count in Counter(wanted).items():
        kinds = [kind for kind, _ in want.resources]
        most = _written({kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in kinds})
        left = _written({kind: free.get(kind, 0) for kind in kinds})
        who = "1 replica waits" if count == 1 else f"{count} replicas wait, each"
        has = f"1 node with {most}" if len(nodes) == 1 else f"{len(nodes)} nodes with at most {most}"
        lines.append(f"{who} for {want}; the cluster has {has}, and {left} is free")
    return tuple(lines)


def _waiting(prefix: str) -> tuple[str, ...]:
    wanted = unplaced(ray.util.placement_group_table().values(), prefix)
    if not wanted:
        return ()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return missing(wanted, nodes, ray.available_resources())


def _written(resources: Resources) -> str:
    return "{" + ", ".join(f"{kind}: {amount:g}" for kind, amount in resources.items()) + "}"
