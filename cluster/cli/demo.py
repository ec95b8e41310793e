"""`easel demo`: eight prompts at once on a cluster of this machine, watched while they are denoised."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import click
from rich.console import Console

from cluster import embedded
from cluster.cli.connection import open_client
from cluster.cli.demo_board import DemoJob, LineBoard, LiveBoard, summary_table, totals_line
from cluster.cli.live import make_console, on_terminal
from cluster.cli.signals import sigterm_interrupts
from cluster.client import EaselClient, Event
from cluster.errors import EaselError, StartupError

PROMPTS = Path(__file__).resolve().parents[2] / "models" / "demo_prompts.json"
READY_S = 120.0
JOB_TIMEOUT_S = 300.0
SEED = 2026

# How long a step stays on a terminal.
FRAME_S = 0.15

Changed = Callable[[DemoJob], None]
Events = asyncio.Queue[Event | EaselError | None]


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Router's port.  [default: a free one]")
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="Denoiser replicas.")
@click.pass_context
def demo(context: click.Context, port: int, replicas: int) -> None:
    """Denoise eight prompts at once and check their answers.

    Uses the cluster that runs on this machine; without one, it starts one and stops it at the end.
    """
    jobs = load_jobs(PROMPTS)
    running = embedded.current()
    started = running is None
    with sigterm_interrupts():
        try:
            if running is None:
                running = embedded.up(embedded.UpOptions(port=port, replicas=replicas), click.echo)
            all_right = asyncio.run(run_demo(running.address, jobs, make_console()))
        finally:
            if started:
                embedded.down(click.echo)
    context.exit(0 if all_right else 1)


def load_jobs(path: Path) -> list[DemoJob]:
    """The demo's prompts with their answers. Raises StartupError when the file is missing or no such list."""
    try:
        entries = json.loads(path.read_text())
        return [DemoJob(number, str(e["prompt"]), str(e["answer"])) for number, e in enumerate(entries, 1)]
    except OSError:
        raise StartupError(f"{path} is missing: run the demo from a clone of the repository") from None
    except (ValueError, KeyError, TypeError):
        raise StartupError(f'{path} must be a list of {{"prompt": ..., "answer": ...}}') from None


async def run_demo(address: str, jobs: list[DemoJob], console: Console) -> bool:
    """Run all jobs at once, show them, and print the summary; True when every answer is right."""
    async with open_client(address) as client:
        await client.wait_ready(READY_S)
        live = on_terminal()
        board = LiveBoard(console, jobs) if live else LineBoard(console)
        queues: list[Events] = [asyncio.Queue() for _ in jobs]
        with board:
            shown = [
                _show(job, queue, board.changed, FRAME_S if live else 0.0)
                for job, queue in zip(jobs, queues, strict=True)
            ]
            showing = asyncio.gather(*shown)
            started_s = time.perf_counter()
            await asyncio.gather(*(_run(client, job, queue) for job, queue in zip(jobs, queues, strict=True)))
            wall_s = time.perf_counter() - started_s
            await showing
    console.print()
    console.print(summary_table(jobs))
    console.print(totals_line(jobs, wall_s), soft_wrap=True)
    return all(job.is_right for job in jobs)


async def _run(client: EaselClient, job: DemoJob, queue: Events) -> None:
    """Receive a job's events as fast as they come, and take its time."""
    started_s = time.perf_counter()
    stream = client.stream(job.prompt, drafts=True, seed=SEED + job.number, timeout_s=JOB_TIMEOUT_S)
    try:
        async with aclosing(stream) as events:
            async for event in events:
                queue.put_nowait(event)
    except EaselError as error:
        queue.put_nowait(error)
    finally:
        job.wall_ms = (time.perf_counter() - started_s) * 1000
        queue.put_nowait(None)


async def _show(job: DemoJob, queue: Events, changed: Changed, frame_s: float) -> None:
    """Show a job's events, each for at least a frame: a small model is done before an eye has seen a step."""
    while (event := await queue.get()) is not None:
        if isinstance(event, EaselError):
            job.problem = str(event)
        else:
            job.canvas.apply(event)
        changed(job)
        await asyncio.sleep(frame_s)
