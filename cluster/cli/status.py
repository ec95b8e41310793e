"""`easel status`: what the cluster is doing."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table

from cluster.cli.connection import address_option, json_option, with_client
from cluster.cli.live import make_console
from cluster.cli.output import print_json
from cluster.client import ClusterView


@click.command()
@json_option
@address_option
def status(as_json: bool, address: str | None) -> None:
    """Show replicas, slots in use, the queue and the routers, and why replicas that should run do not."""
    view = with_client(address, lambda client: client.status())
    if as_json:
        print_json(asdict(view))
        return
    click.echo(f"easel {view.version}: {_replicas(view)}, {_load(view)}")
    if view.replicas:
        make_console().print(_table(view))
    for line in view.pending:
        click.echo(f"pending: {line}")
    click.echo(f"{counted(len(view.routers), 'router')}: {', '.join(view.routers) or 'none has a lease'}")


def _replicas(view: ClusterView) -> str:
    """`2 replicas`, or `2 replicas of 1..3` where load decides."""
    there = counted(len(view.replicas), "replica")
    return there if view.max_replicas == 0 else f"{there} of {view.min_replicas}..{view.max_replicas}"


def counted(number: int, thing: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _load(view: ClusterView) -> str:
    return f"{view.active} of {view.slots} slots in use, {view.queued} waiting (at most {view.queue_limit})"


def _table(view: ClusterView) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("replica", "state", "model", "ranks", "slots", "steps", "canvases", "lease", "address"):
        table.add_column(heading, no_wrap=heading == "replica")
    for row in view.replicas:
        table.add_row(
            row.replica,
            "draining" if row.draining else "ready",
            row.model,
            _counter(row.stats, "ranks"),
            f"{row.active}/{row.slots}",
            _counter(row.stats, "denoising_steps"),
            _counter(row.stats, "canvases"),
            f"{row.lease_ms} ms",
            row.address,
        )
    return table


def _counter(stats: dict[str, float], name: str) -> str:
    return f"{stats[name]:.0f}" if name in stats else "-"
