"""How the demo looks: a board that changes in place on a terminal, lines elsewhere, and a summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.live import REFRESHES_PER_S, Canvas, printable
from cluster.core import Usage

PROMPT_CHARS = 34
CAPTION = "every denoising step as it was received, held long enough to be seen; the summary has the real times"


@dataclass(slots=True)
class DemoJob:
    """One prompt of the demo and how far it is. `expected` is the one answer that is right."""

    number: int
    prompt: str
    expected: str
    canvas: Canvas = field(default_factory=Canvas)
    problem: str | None = None
    wall_ms: float = 0.0

    @property
    def answer(self) -> str | None:
        """The whole answer, or None while there is none."""
        return self.canvas.committed if self.canvas.finished is not None else None

    @property
    def is_right(self) -> bool:
        """True when the whole answer is the expected one."""
        return self.answer == self.expected

    @property
    def usage(self) -> Usage:
        """What the job took; zeros until it has finished."""
        return self.canvas.finished.usage if self.canvas.finished is not None else Usage()

    @property
    def replica(self) -> str:
        """The replica at work, as far as it is known."""
        if self.canvas.finished is not None:
            return self.canvas.finished.replica
        return self.canvas.draft.replica if self.canvas.draft is not None else ""


class LiveBoard:
    """One row per job, redrawn in place: committed text solid, the draft behind it dim."""

    def __init__(self, console: Console, jobs: list[DemoJob]) -> None:
        self._jobs = jobs
        self._live = Live(self._table(), console=console, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def changed(self, job: DemoJob) -> None:
        """Show the jobs as they stand now."""
        self._live.update(self._table())

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, expand=True, caption=CAPTION, caption_justify="left")
        table.add_column("prompt", style="bold", no_wrap=True, overflow="ellipsis", width=PROMPT_CHARS)
        table.add_column("canvas", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("step", justify="right", width=7)
        table.add_column("entropy", justify="right", width=7)
        table.add_column("replica", no_wrap=True, overflow="ellipsis", width=12)
        for job in self._jobs:
            table.add_row(job.prompt, _body(job), *_progress(job), job.replica)
        return table


def _body(job: DemoJob) -> Text:
    if job.problem is not None:
        return Text(job.problem, style="red")
    body = job.canvas.body()
    body.plain = body.plain.replace("\n", "⏎")
    if job.answer is not None:
        body.append("  ✓" if job.is_right else "  ✗", style="green" if job.is_right else "red")
    return body


def _progress(job: DemoJob) -> tuple[str, str]:
    draft = job.canvas.draft
    if draft is not None:
        return f"{draft.canvas_index}:{draft.step}", f"{draft.mean_entropy:.3f}"
    return (str(job.usage.denoising_steps) if job.answer is not None else "", "")


class LineBoard:
    """One line for every canvas that is final and every job that ends: for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def changed(self, job: DemoJob) -> None:
        """Print what is new about a job, if it is worth a line."""
        if job.problem is not None:
            self._say(job, f"failed: {job.problem}")
        elif job.answer is not None:
            self._say(job, f"finished on {job.replica}: {printable(job.answer)}")
        elif job.canvas.canvases > self._told.get(job.number, 0):
            self._told[job.number] = job.canvas.canvases
            self._say(job, f"canvas {job.canvas.canvases} is final: {printable(job.canvas.committed)}")

    def _say(self, job: DemoJob, what: str) -> None:
        line = Text(f"[{job.number}] {what}".replace("\n", "⏎"))
        self._console.print(line, soft_wrap=True)


def summary_table(jobs: list[DemoJob]) -> Table:
    """All jobs with their answers, and what was expected where an answer is wrong."""
    table = Table(box=None, pad_edge=False)
    for heading in ("prompt", "answer", ""):
        table.add_column(heading, overflow="fold")
    for heading in ("canvases", "steps", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("replica", overflow="fold")
    for job in jobs:
        usage = job.usage
        table.add_row(
            job.prompt,
            _answer(job),
            Text("ok", style="green") if job.is_right else Text(f"expected {job.expected}", style="red"),
            str(usage.canvases),
            str(usage.denoising_steps),
            f"{job.wall_ms:.0f}",
            job.replica,
        )
    return table


def _answer(job: DemoJob) -> Text:
    if job.problem is not None:
        return Text(job.problem, style="red")
    return Text(printable(job.canvas.committed))


def totals_line(jobs: list[DemoJob], wall_s: float) -> str:
    """Right answers, tokens a second over all jobs, and how many replicas took part."""
    right = sum(job.is_right for job in jobs)
    tokens = sum(job.usage.generated_tokens for job in jobs)
    steps = sum(job.usage.denoising_steps for job in jobs)
    replicas = {job.replica for job in jobs if job.answer is not None}
    served = f"{len(replicas)} replica{'' if len(replicas) == 1 else 's'} served"
    return (
        f"{right} of {len(jobs)} answers right · {tokens} tokens in {steps} steps and {wall_s:.2f} s "
        f"· {tokens / max(wall_s, 1e-9):.0f} tokens/s · {served}"
    )
