"""The processes of a local cluster, found by the session that its warden leads and by their titles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import Enum

import psutil

from cluster.embedded import LocalCluster, session_of


class Role(Enum):
    """What a process of the cluster is; after "ray::", the title that Ray gives it begins with the value."""

    DENOISER = "ServeReplica:easel:Denoiser"
    ROUTER = "ServeReplica:easel:Router"
    RANK = "Rank."


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the cluster with the TCP ports it listens on. `frozen` tells that SIGSTOP holds it."""

    role: Role
    process: psutil.Process
    ports: frozenset[int]
    frozen: bool


def members(cluster: LocalCluster) -> list[Member]:
    """The replicas, routers and ranks of a cluster, in the order of their process ids."""
    found = []
    for process in session_of(cluster.pid):
        with contextlib.suppress(psutil.Error):
            role = _role(" ".join(process.cmdline()))
            if role is not None:
                found.append(Member(role, process, _ports(process), process.status() == psutil.STATUS_STOPPED))
    return sorted(found, key=lambda member: member.process.pid)


def _role(title: str) -> Role | None:
    return next((role for role in Role if title.startswith(f"ray::{role.value}")), None)


def _ports(process: psutil.Process) -> frozenset[int]:
    connections = process.net_connections(kind="tcp")
    return frozenset(link.laddr.port for link in connections if link.status == psutil.CONN_LISTEN)


@dataclass(frozen=True, slots=True)
class Shape:
    """How many processes of each role a cluster has when it is whole."""

    replicas: int
    routers: int
    ranks: int


def shape_of(found: list[Member]) -> Shape:
    """The processes of a cluster, counted."""
    roles = [member.role for member in found]
    return Shape(roles.count(Role.DENOISER), roles.count(Role.ROUTER), roles.count(Role.RANK))
