"""`easel keys`: credentials for tenants."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from cluster.cli.connection import json_option
from cluster.cli.output import print_json
from cluster.errors import ConfigError
from cluster.security.api_keys import new_key


@click.group()
def keys() -> None:
    """Make API keys for tenants."""


@keys.command()
@click.option("--tenant", required=True, metavar="NAME", help="Whom the key is for.")
@click.option("--admin", is_flag=True, help="The key may drain replicas and see them in the status.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="The last day, in UTC, on which it is good.")
@click.option("--file", "path", metavar="FILE", help="Add its line to this file, security.api_keys_file.")
@json_option
def new(tenant: str, admin: bool, until: datetime | None, path: str | None, as_json: bool) -> None:
    """Print a new key, and the line that the routers' file must hold to know it.

    The line is a digest: the key is in no file, and cannot be shown again.
    """
    key, line = new_key(tenant, admin=admin, until=None if until is None else until.date())
    if path is not None:
        _add(Path(path), line)
    if as_json:
        print_json({"key": key, "line": line})
        return
    click.echo(f"key:  {key}")
    click.echo(f"line: {line}" if path is None else f"line: added to {path}")


def _add(path: Path, line: str) -> None:
    try:
        text = path.read_text() if path.exists() else ""
        path.write_text(text + ("\n" if text and not text.endswith("\n") else "") + line + "\n")
    except OSError as error:
        raise ConfigError(f"--file: {path} cannot be written: {error.strerror}") from None
