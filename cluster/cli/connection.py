"""Which cluster a command talks to, and the client it does it with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from cluster import embedded
from cluster.client import EaselClient
from cluster.config import DEFAULT_PORT, router_address

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., Any])


def address_option(command: Command) -> Command:
    """Adds --address."""
    return click.option(
        "--address",
        metavar="HOST:PORT[,...]",
        callback=_checked,
        help="The cluster to talk to, by one of its routers or several. Default: $EASEL_ADDRESS, else the cluster on "
        "this machine.",
    )(command)


def json_option(command: Command) -> Command:
    """Adds --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def _checked(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    for part in [] if value is None else value.split(","):
        if ":" not in part or any(c.isspace() for c in part):
            raise click.BadParameter(f"{part!r} is no host:port, such as localhost:{DEFAULT_PORT}")
    return value


def resolve(address: str | None) -> str:
    """The router to talk to, as the help text of `easel` says. Starts nothing and connects to nothing."""
    return address or router_address() or _local_address() or f"localhost:{DEFAULT_PORT}"


def _local_address() -> str | None:
    running = embedded.current()
    return None if running is None else running.address


def with_client(address: str | None, body: Callable[[EaselClient], Coroutine[Any, Any, Result]]) -> Result:
    """Run `body` in an event loop with a client of the chosen cluster, and close the client."""

    async def session() -> Result:
        async with EaselClient(resolve(address)) as client:
            return await body(client)

    return asyncio.run(session())
