"""What a replica reserves, and what is said when there is no room for it; Ray's tables as Ray gives them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import parse_settings
from deployments.placement import Wanted, missing, placement_options, unplaced

CPU = (("CPU", 1.0),)
CPU_AND_GPU = (("CPU", 2.0), ("GPU", 1.0))


def options(**denoiser: object) -> dict[str, Any]:
    return placement_options(parse_settings({"checkpoint": "x", "denoiser": denoiser}).denoiser)


def test_every_rank_gets_a_bundle_and_the_replica_itself_fits_the_first() -> None:
    chosen = options(tp=3, num_cpus=2, num_gpus=1, placement="spread")
    assert chosen["placement_group_bundles"] == [{"CPU": 2, "GPU": 1}] * 3
    assert chosen["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
    assert chosen["placement_group_strategy"] == "SPREAD"


def test_ranks_are_on_one_node_unless_told_otherwise() -> None:
    assert options(tp=2)["placement_group_strategy"] == "STRICT_PACK"


def test_a_rank_that_needs_nothing_still_has_a_bundle_that_ray_takes() -> None:
    assert options(num_cpus=0)["placement_group_bundles"] == [{"CPU": 0.001}]


def group(name: str, state: str, *bundles: dict[str, float], strategy: str = "STRICT_PACK") -> dict[str, Any]:
    return {"name": name, "state": state, "bundles": dict(enumerate(bundles)), "strategy": strategy}


def test_only_groups_that_have_no_place_and_are_ours_count() -> None:
    table = [
        group("ours#1", "CREATED", {"CPU": 1.0}),
        group("ours#2", "PENDING", {"CPU": 1.0}, {"CPU": 1.0}),
        group("ours#3", "RESCHEDULING", {"CPU": 1.0}),
        group("ours#4", "REMOVED", {"CPU": 1.0}),
        group("theirs#1", "PENDING", {"CPU": 1.0}),
    ]
    assert unplaced(table, "ours#") == [Wanted(2, CPU, "STRICT_PACK"), Wanted(1, CPU, "STRICT_PACK")]


@pytest.mark.parametrize(
    ("wanted", "nodes", "free", "said"),
    [
        (
            [Wanted(2, CPU_AND_GPU, "STRICT_PACK")],
            [{"CPU": 4.0, "memory": 9.0}],
            {"CPU": 3.5},
            "1 replica waits for 2 x {CPU: 2, GPU: 1} on one node; "
            "the cluster has 1 node with {CPU: 4, GPU: 0}, and {CPU: 3.5, GPU: 0} is free",
        ),
        (
            [Wanted(2, CPU, "STRICT_SPREAD")] * 3,
            [{"CPU": 1.0}, {"CPU": 8.0}],
            {},
            "3 replicas wait, each for 2 x {CPU: 1}, each on another node; "
            "the cluster has 2 nodes with at most {CPU: 8}, and {CPU: 0} is free",
        ),
        (
            [Wanted(1, CPU, "STRICT_PACK")],
            [],
            {},
            "1 replica waits for {CPU: 1}; the cluster has 0 nodes with at most {CPU: 0}, and {CPU: 0} is free",
        ),
    ],
)
def test_a_line_says_what_is_wanted_and_what_there_is(
    wanted: list[Wanted], nodes: list[dict[str, float]], free: dict[str, float], said: str
) -> None:
    assert missing(wanted, nodes, free) == (said,)


def test_replicas_that_want_different_things_get_a_line_each() -> None:
    wanted = [Wanted(1, CPU, "STRICT_PACK"), Wanted(2, CPU, "PACK"), Wanted(2, CPU, "PACK")]
    lines = missing(wanted, [{"CPU": 0.5}], {})
    assert [line.split(";")[0] for line in lines] == [
        "1 replica waits for {CPU: 1}",
        "2 replicas wait, each for 2 x {CPU: 1}",
    ]
