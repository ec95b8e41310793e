"""Runs `easel` in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from cluster import embedded
from cluster.cli.app import easel
from tests.unit.fake_router import Served


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command line."""
    return CliRunner().invoke(easel, arguments, input=stdin)


def at(served: Served, *arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command line against a router."""
    return invoke(*arguments, "--address", served.address, stdin=stdin)


def local_cluster(address: str) -> embedded.LocalCluster:
    """A cluster of this machine that runs in name only."""
    return embedded.LocalCluster(
        pid=1,
        born_s=0.0,
        address=address,
        redis_url="",
        redis_pid=None,
        checkpoint="",
        log_dir="/logs",
        ray_dir="",
        ray_address="",
    )
