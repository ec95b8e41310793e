"""Which cluster a command talks to, and the client it does it with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from cluster import embedded
from cluster.client import EaselClient
from cluster.config import DEFAULT_PORT, credential_environment, router_address
from cluster.trust import ClientTls, key_in

Result = TypeVar("Result")
_TRUST = {
    "ca_file": "Certificates that the cluster's must come from; the system's if not given",
    "cert_file": "A client certificate, for clusters that ask for one",
    "key_file": "The key of the client certificate",
    "api_key_file": "The API key or token; EASEL_API_KEY can hold it too",
}
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


def trust_options(command: Command) -> Command:
    """Adds what goes before every command: which certificates to trust and to show."""
    told = {name: f"{what}. [env: EASEL_{name.upper()}]" for name, what in _TRUST.items()}
    options = [click.option(f"--{name.replace('_', '-')}", metavar="FILE", help=text) for name, text in told.items()]
    options.append(click.option("--server-name", metavar="NAME", help="Whom the certificate is for, if not the host."))
    options.append(click.option("--tls", is_flag=True, default=None, help="Use TLS; options on certificates do too."))
    for option in reversed(options):
        command = option(command)
    return command


def open_client(address: str) -> EaselClient:
    """A client that shows and trusts what the command line says, then the environment. Raises ConfigError."""
    context = click.get_current_context(silent=True)
    given = {} if context is None else context.find_root().params
    chosen: dict[str, Any] = {**credential_environment(), **{name: v for name, v in given.items() if v is not None}}
    api_key = chosen.get("api_key")
    if chosen.get("api_key_file") and not api_key:
        api_key = key_in(chosen["api_key_file"])
    files = {name: chosen[name] for name in ("ca_file", "cert_file", "key_file", "server_name") if chosen.get(name)}
    tls = ClientTls(**files) if files or chosen.get("tls") else None
    return EaselClient(address, tls=tls, api_key=api_key)


def with_client(address: str | None, body: Callable[[EaselClient], Coroutine[Any, Any, Result]]) -> Result:
    """Run `body` in an event loop with a client of the chosen cluster, and close the client."""

    async def session() -> Result:
        async with open_client(resolve(address)) as client:
            return await body(client)

    return asyncio.run(session())
