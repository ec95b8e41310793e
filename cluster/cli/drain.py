"""`easel drain`: take a replica out of service without losing a denoising step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import click

from cluster.cli.connection import address_option, json_option, with_client
from cluster.cli.output import print_json
from cluster.cli.status import counted
from cluster.client import EaselClient
from cluster.core import ReplicaRow, Violation
from cluster.errors import EaselError, InvalidRequest, ReplicaNotFound

LOOK_EVERY_S = 0.1


@dataclass(slots=True)
class Drain:
    """A replica on its way out. `left_jobs` is None until the order is given, and 0 once the replica is gone."""

    replica: str
    moved_jobs: int = 0
    left_jobs: int | None = None


@click.command()
@click.argument("replica")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, 3600, min_open=True),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Longest wait for the replica to leave, in seconds.",
)
@json_option
@address_option
def drain(replica: str, timeout_s: float, as_json: bool, address: str | None) -> None:
    """Have REPLICA give back its jobs and leave, and wait until it has.

    Its jobs go on elsewhere from the denoising step they are at; new ones go elsewhere at once. REPLICA is an id that
    `easel status` shows, or the beginning of just one of them. Ctrl-C ends the wait, not the drain.
    """

    async def body(client: EaselClient) -> Drain:
        draining = Drain(replica)
        try:
            async with asyncio.timeout(timeout_s):
                await _drain(client, draining, quiet=as_json)
        except TimeoutError:
            raise EaselError(_too_long(draining, timeout_s)) from None
        return draining

    started_s = time.perf_counter()
    done = with_client(address, body)
    took_s = time.perf_counter() - started_s
    if as_json:
        print_json({"replica": done.replica, "moved_jobs": done.moved_jobs, "drain_ms": round(took_s * 1000)})
    else:
        click.echo(f"drained {done.replica}: {counted(done.moved_jobs, 'job')} moved in {took_s:.1f} s")


async def _drain(client: EaselClient, draining: Drain, *, quiet: bool) -> None:
    view = await client.status()
    # Who may not drain sees no replicas; the cluster says so by itself.
    if view.replicas or not view.slots:
        draining.replica = chosen(draining.replica, [row.replica for row in view.replicas])
    draining.moved_jobs = draining.left_jobs = await client.drain(draining.replica)
    said = None
    while row := _row(draining.replica, (await client.status()).replicas):
        draining.left_jobs = row.active
        if row.active != said and not quiet:
            click.echo(f"draining {draining.replica}: {counted(row.active, 'job')} left", err=True)
            said = row.active
        await asyncio.sleep(LOOK_EVERY_S)


def chosen(given: str, replicas: Sequence[str]) -> str:
    """The replica called `given`, else the only one that begins so.

    Raises ReplicaNotFound, or InvalidRequest when there are several.
    """
    found = [given] if given in replicas else [name for name in replicas if given and name.startswith(given)]
    if not found:
        there = f"there are {', '.join(replicas)}" if replicas else "there is none"
        raise ReplicaNotFound(f"no replica has the id {given!r}; {there}")
    if len(found) > 1:
        raise InvalidRequest([Violation("replica", f"is {given!r}, which could be {', '.join(found)}")])
    return found[0]


def _row(replica: str, rows: Sequence[ReplicaRow]) -> ReplicaRow | None:
    return next((row for row in rows if row.replica == replica), None)


def _too_long(draining: Drain, timeout_s: float) -> str:
    if draining.left_jobs is None:
        return f"the cluster did not take the order to drain {draining.replica} within {timeout_s:g} s"
    left = counted(draining.left_jobs, "job")
    return f"replica {draining.replica} has not left after {timeout_s:g} s, with {left} on it; it goes on draining"
