"""`easel up` and `easel down`: a cluster on this machine."""

from __future__ import annotations

import sys
from typing import Any

import click

from cluster import embedded
from cluster.cli.signals import sigterm_interrupts
from cluster.config import DEFAULT_PORT
from cluster.errors import StartupError


@click.command()
@click.option("--foreground", is_flag=True, help="Stay until Ctrl-C, then stop the cluster.")
@click.option("--config", metavar="FILE", help="Settings in YAML; the options here go before it.")
@click.option("--checkpoint", metavar="DIR", help="Model folder.  [default: the repository's demo model]")
@click.option("--replicas", type=click.IntRange(1), help="Denoiser replicas.  [default: 2]")
@click.option("--min-replicas", type=click.IntRange(0), help="Fewest replicas, with --max-replicas.  [default: 1]")
@click.option("--max-replicas", type=click.IntRange(1), help="Most replicas: as many run as load needs.")
@click.option("--tp", type=click.IntRange(1), help="Ranks per replica.  [default: 1]")
@click.option("--slots", type=click.IntRange(1), help="Jobs at once per replica.  [default: 8]")
@click.option("--routers", type=click.IntRange(1), help="Routers, which share the port.  [default: 1]")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Port of the routers; 0: any.  [default: {DEFAULT_PORT}]")
@click.option("--redis-url", metavar="URL", help="Redis to use.  [default: one of its own]")
@click.option("--engine", type=click.Choice(["torch", "fake"]), help="What computes.  [default: torch]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Run dtype.  [default: float32]")
def up(foreground: bool, **options: Any) -> None:  # noqa: ANN401 - the options are those of UpOptions
    """Start a cluster on this machine: Ray, Redis, routers and replicas.

    Returns when the cluster answers; it goes on until `easel down`.
    """
    chosen = embedded.UpOptions(**options)
    with sigterm_interrupts():
        if foreground:
            _stay(chosen)
        else:
            _say_up(embedded.up(chosen, click.echo))
            click.echo("try: easel generate 'count 31 to 34'    stop: easel down")


def _say_up(running: embedded.LocalCluster) -> None:
    click.echo(f"easel is up at {running.address}, logs are in {running.log_dir}")


def _stay(options: embedded.UpOptions) -> None:
    """Own a cluster until it ends or a signal says to end it; it is down after this in every case."""
    running = None
    # The signal can come at any line: between "is up" and the wait as well.
    try:
        running = embedded.up(options, click.echo)
        _say_up(running)
        click.echo("Ctrl-C stops it")
        sys.stdout.flush()
        embedded.wait_foreground(running)
    except KeyboardInterrupt:
        return
    finally:
        if running is not None:
            embedded.down(click.echo)
    raise StartupError(f"the cluster ended by itself; see {running.log_dir}")


@click.command()
def down() -> None:
    """Stop the cluster on this machine."""
    if not embedded.down(click.echo):
        click.echo("no cluster runs on this machine")
