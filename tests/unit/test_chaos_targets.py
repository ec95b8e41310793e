"""Which replicas a chaos run may hit, and what it knows of them when it does."""

from __future__ import annotations

import psutil
import pytest

from cluster.chaos.processes import Member, Role, Shape, shape_of
from cluster.chaos.schedule import KillKind
from cluster.chaos.targets import Targets, busy, live_replicas, live_rows
from cluster.client import ClusterView, EaselClient
from cluster.core import ReplicaRow

ME = psutil.Process()


def row(name: str, port: int, *, active: int = 0, lease_ms: int = 5000, draining: bool = False) -> ReplicaRow:
    return ReplicaRow(name, f"127.0.0.1:{port}", "tiny", "v", 4, active, lease_ms, {}, draining)


def member(port: int, *, role: Role = Role.DENOISER, frozen: bool = False) -> Member:
    return Member(role, ME, frozenset({port, port + 1000}), frozen)


def view(*rows: ReplicaRow, queued: int = 0) -> ClusterView:
    active = sum(each.active for each in rows)
    return ClusterView(rows, 4 * len(rows), active, queued, 1000, ("router-a",), "0")


def test_a_replica_is_live_when_its_row_and_its_process_are() -> None:
    found = [member(1), member(2)]
    live = live_rows(found, view(row("a", 1), row("b", 2)))
    assert [(each.replica, process) for each, process in live] == [("a", found[0]), ("b", found[1])]


@pytest.mark.parametrize(
    ("process", "entry"),
    [
        (member(1, frozen=True), row("a", 1)),
        (member(1, role=Role.ROUTER), row("a", 1)),
        (member(2), row("a", 1)),
        (member(1), row("a", 1, lease_ms=0)),
        (member(1), row("a", 1, draining=True)),
    ],
    ids=["frozen", "a router", "killed, and its lease runs on", "its lease ended", "draining"],
)
def test_a_replica_that_cannot_take_jobs_is_not_live(process: Member, entry: ReplicaRow) -> None:
    assert not live_rows([process], view(entry))


@pytest.mark.parametrize(
    ("jobs", "queued", "has_room"), [((2, 2), 0, True), ((3, 2), 0, False), ((2, 2), 1, False), ((0, 4), 0, True)]
)
def test_there_is_room_when_the_others_could_take_every_job(jobs: tuple[int, int], queued: int, has_room: bool) -> None:
    rows = (row("a", 1, active=jobs[0]), row("b", 2, active=jobs[1]))
    assert live_replicas([member(1), member(2)], view(*rows, queued=queued))[0].had_room is has_room


def test_a_replica_with_jobs_is_hit_before_an_idle_one() -> None:
    found = [member(1), member(2)]
    targets = live_replicas(found, view(row("a", 1), row("b", 2, active=1)))
    assert [target.replica for target in busy(targets)] == ["b"]
    idle = live_replicas(found, view(row("a", 1), row("b", 2)))
    assert busy(idle) == idle


def test_a_cluster_is_counted_by_roles() -> None:
    found = [member(1), member(2), member(3, role=Role.ROUTER), member(4, role=Role.RANK)]
    assert shape_of(found) == Shape(replicas=2, routers=1, ranks=1)


@pytest.mark.parametrize(
    ("shape", "never"),
    [
        (Shape(2, 2, 0), {KillKind.RANK}),
        (Shape(2, 1, 4), {KillKind.ROUTER}),
        (Shape(1, 2, 2), {KillKind.REPLICA, KillKind.FREEZE, KillKind.DRAIN, KillKind.RANK}),
    ],
)
def test_the_only_one_of_its_kind_is_never_hit(shape: Shape, never: set[KillKind]) -> None:
    targets = Targets(EaselClient("localhost:1"), shape)
    kinds = set(KillKind) - {KillKind.REDIS}
    assert {kind for kind in kinds if not targets.ever(kind)} == never
