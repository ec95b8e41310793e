"""`easel submit`, `get`, `watch`, `cancel` and `jobs`: work that outlives the command that asked for it."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from cluster.cli.connection import address_option, json_option, with_client
from cluster.cli.live import make_console, on_terminal, printable, show_live, usage_words
from cluster.cli.output import job_json, print_json
from cluster.cli.request_options import image_option, prompt_of, request_options, to_request_options
from cluster.client import Committed, EaselClient, JobAttempt, JobView
from cluster.rpc.easel.v1 import jobs_pb2

STATES = [name.removeprefix("JOB_STATE_").lower() for name in jobs_pb2.JobState.keys()[1:]]


@click.command()
@click.argument("prompt")
@image_option
@request_options
@json_option
@address_option
def submit(prompt: str, images: tuple[Path, ...], as_json: bool, address: str | None, **values: Any) -> None:  # noqa: ANN401
    """Store a job for PROMPT ("-" reads standard input) and print its id at once.

    Read it later with `easel get`, or follow it with `easel watch`.
    """
    options = to_request_options(values)
    asked = prompt_of(prompt, images)
    job = with_client(address, lambda client: client.submit(asked, drafts=True, **options))
    if as_json:
        print_json(job_json(job))
    else:
        click.echo(job.job_id)


@click.command()
@click.argument("job_id")
@json_option
@address_option
def get(job_id: str, as_json: bool, address: str | None) -> None:
    """Show the job JOB_ID as it stands, with what is committed of its answer."""
    _show(with_client(address, lambda client: client.get(job_id)), as_json=as_json)


@click.command()
@click.argument("job_id")
@json_option
@address_option
def cancel(job_id: str, as_json: bool, address: str | None) -> None:
    """Stop the job JOB_ID at its next denoising step. One that has succeeded or failed already is an error."""
    job = with_client(address, lambda client: client.cancel(job_id))
    if as_json:
        print_json(job_json(job))
    else:
        click.echo(f"{job.job_id} {job.state}")


@click.command()
@click.argument("job_id")
@click.option("--from-canvas", type=int, default=0, show_default=True, help="First canvas to show.")
@click.option("--no-drafts", is_flag=True, help="Show canvases only when they are final.")
@address_option
def watch(job_id: str, from_canvas: int, no_drafts: bool, address: str | None) -> None:
    """Follow the job JOB_ID until it ends. Ctrl-C leaves the job running."""
    live = on_terminal()

    async def body(client: EaselClient) -> None:
        async with aclosing(client.watch(job_id, from_canvas, drafts=live and not no_drafts)) as events:
            if live:
                await show_live(make_console(), events)
                return
            async for event in events:
                if isinstance(event, Committed):
                    click.echo(event.text, nl=False)
            click.echo()

    with_client(address, body)


@click.command()
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most jobs to show.")
@json_option
@address_option
def jobs(state: str | None, limit: int, as_json: bool, address: str | None) -> None:
    """List jobs, newest first."""

    async def body(client: EaselClient) -> list[JobView]:
        found: list[JobView] = []
        async with aclosing(client.jobs(state)) as listed:
            async for job in listed:
                found.append(job)
                if len(found) == limit:
                    break
        return found

    found = with_client(address, body)
    if as_json:
        print_json([job_json(job) for job in found])
    elif found:
        make_console().print(_table(found))
    else:
        click.echo("no jobs" if state is None else f"no {state} jobs")


def _show(job: JobView, *, as_json: bool) -> None:
    if as_json:
        print_json(job_json(job))
        return
    for name, value in _facts(job):
        if value:
            click.echo(f"{name:<9} {value}")
    for attempt in job.history:
        click.echo(attempt_line(attempt))
    if job.text:
        click.echo(f"\n{job.text}")


def attempt_line(attempt: JobAttempt) -> str:
    """One line on a run that ended before its job did."""
    ran_ms = round((attempt.ended_at - attempt.started_at).total_seconds() * 1000)
    line = f"attempt {attempt.epoch} on {attempt.replica}: {attempt.reason}, after {ran_ms} ms: {attempt.message}"
    return printable(" ".join(line.split()))


def _facts(job: JobView) -> list[tuple[str, str]]:
    return [
        ("job", job.job_id),
        ("state", job.state),
        ("reason", job.finish_reason.value if job.finish_reason else ""),
        ("error", f"{job.problem.reason}: {job.problem.message}" if job.problem else ""),
        ("priority", job.priority.name.lower()),
        ("tenant", job.tenant),
        ("created", job.created_at.isoformat(timespec="milliseconds")),
        ("finished", job.finished_at.isoformat(timespec="milliseconds") if job.finished_at else ""),
        ("deadline", job.deadline_at.isoformat(timespec="milliseconds") if job.deadline_at else ""),
        ("replica", job.replica),
        ("seed", str(job.seed)),
        ("usage", ", ".join(usage_words(job.usage))),
    ]


def _table(found: list[JobView]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "state", "priority", "tenant", "created", "canvases", "steps", "replica"):
        table.add_column(heading, no_wrap=heading in {"job", "state"})
    for job in found:
        table.add_row(
            job.job_id,
            job.state,
            job.priority.name.lower(),
            printable(job.tenant),
            job.created_at.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00"),
            str(job.usage.canvases),
            str(job.usage.denoising_steps),
            job.replica,
        )
    return table
