"""`easel config`: the settings that a cluster would run with."""

from __future__ import annotations

from typing import Any

import click
import yaml

from cluster.cli.output import print_json
from cluster.config import Settings, parse_settings
from cluster.embedded import UpOptions, chosen_values
from cluster.jobs.connection import without_password


@click.command()
@click.option("--config", "path", metavar="FILE", help="Settings in YAML; without one, the defaults.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of all settings.")
@click.option("--check", is_flag=True, help="Print nothing but what is wrong.")
def config(path: str | None, schema: bool, check: bool) -> None:
    """Print the settings that a cluster would run with, as YAML that `easel up --config` takes.

    They come from FILE; above it from the environment, where EASEL__ROUTER__PORT=8600 is router.port. Passwords
    inside URLs are left out.
    """
    if schema:
        print_json(Settings.model_json_schema())
        return
    settings = parse_settings(chosen_values(UpOptions(config=path)))
    if not check:
        values = _printable(settings.model_dump(mode="json"))
        click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def _printable(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return without_password(value) if isinstance(value, str) and "://" in value else value
