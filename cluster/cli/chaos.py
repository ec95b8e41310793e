"""`easel chaos`: kill parts of a local cluster while it works, and compare every answer with an undisturbed run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import click
from rich.console import Console

from cluster import embedded
from cluster.chaos.board import Board
from cluster.chaos.options import ChaosOptions
from cluster.chaos.report import Report
from cluster.chaos.run import ChaosRun
from cluster.chaos.settling import left_over, watched
from cluster.cli.live import make_console, on_terminal
from cluster.cli.output import print_json
from cluster.cli.signals import sigterm_interrupts
from cluster.config import parse_settings
from cluster.embedded import LocalCluster
from cluster.errors import StartupError

DEFAULTS = ChaosOptions()
MOST_LINES = 60


@click.command()
@click.option("--jobs", type=click.IntRange(1, 1_000_000), default=DEFAULTS.jobs, show_default=True, help="Jobs.")
@click.option("--seed", type=click.IntRange(0), default=DEFAULTS.seed, show_default=True, help="Draws jobs and kills.")
@click.option(
    "--kill-every-s",
    type=click.FloatRange(0.1, 3600),
    default=DEFAULTS.kill_every_s,
    show_default=True,
    help="Seconds between two kills; a kill that would end the last replica or router waits.",
)
@click.option("--replicas", type=click.IntRange(1), default=DEFAULTS.replicas, show_default=True, help="Replicas.")
@click.option("--routers", type=click.IntRange(1), default=DEFAULTS.routers, show_default=True, help="Routers.")
@click.option("--tp", type=click.IntRange(1, 64), default=DEFAULTS.tp, show_default=True, help="Ranks per replica.")
@click.option("--slots", type=click.IntRange(1), default=DEFAULTS.slots, show_default=True, help="Slots per replica.")
@click.option(
    "--in-flight", type=click.IntRange(1), default=DEFAULTS.in_flight, show_default=True, help="Jobs at once."
)
@click.option("--use-running", is_flag=True, help="Kill parts of the cluster that runs on this machine already.")
@click.pass_context
def chaos(context: click.Context, /, use_running: bool, **options: Any) -> None:  # noqa: ANN401 - those of ChaosOptions
    """Kill parts of a cluster while it works, and compare every answer with an undisturbed run.

    Starts a cluster, runs jobs of mixed kinds on it, runs them again while replicas, routers and Redis are killed, and
    stops it. The last line is one JSON object. Exits with 0 when no job was lost, no canvas came twice, no answer
    differs and nothing leaked; else with 1.
    """
    chosen = ChaosOptions(**options)
    console = make_console()
    report = _on_running(chosen, console) if use_running else _on_its_own(chosen, console)
    _say(console, report.broken_calls())
    _say(console, report.problems())
    console.print(report.table())
    print_json(report.figures())
    context.exit(0 if report.passed else 1)


def _say(console: Console, lines: list[str]) -> None:
    for line in lines[:MOST_LINES]:
        console.print(line, soft_wrap=True)
    if len(lines) > MOST_LINES:
        console.print(f"and {len(lines) - MOST_LINES} more of these")


def _on_its_own(options: ChaosOptions, console: Console) -> Report:
    """Against a cluster that is started for it, and is down after this in every case."""
    running = embedded.current()
    if running is not None:
        where = f"a cluster runs here already, at {running.address}"
        raise StartupError(f"{where}: stop it with `easel down`, or have parts of it killed with --use-running")
    with sigterm_interrupts():
        try:
            cluster = embedded.start(parse_settings(options.settings()), own_redis=True, report=click.echo)
            report = _run(options, cluster, console)
            last = embedded.current() or cluster
            before = watched(last)
        finally:
            embedded.down(click.echo)
    return replace(report, left_over=left_over(last, before))


def _on_running(options: ChaosOptions, console: Console) -> Report:
    """Against the cluster that runs, which goes on afterwards; its shape is its own."""
    running = embedded.current()
    if running is None:
        raise StartupError("no cluster runs on this machine; leave --use-running out to have one started")
    with sigterm_interrupts():
        return _run(options, running, console)


def _run(options: ChaosOptions, cluster: LocalCluster, console: Console) -> Report:
    with Board(console, live=on_terminal()) as board:
        return asyncio.run(ChaosRun(options, cluster.address, board).run())
