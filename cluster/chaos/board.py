"""How far a chaos run is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0


class Board:
    """One bar, or one line now and then, for each phase; what happens is told in lines above."""

    def __init__(self, console: Console, *, live: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._console = console
        self._progress = Progress(*columns, console=console, disable=not live)
        self._live = live
        self._task: TaskID | None = None
        self._phase = ""
        self._done = self._total = 0
        self._began_s = self._told_s = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, phase: str, jobs: int) -> None:
        """A phase of so many jobs begins."""
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(phase, total=jobs)
        self._phase, self._done, self._total = phase, 0, jobs
        self._began_s = self._told_s = time.monotonic()
        if not self._live:
            self._console.print(f"{phase}: {jobs} jobs")

    def job_ended(self) -> None:
        """One more job of the phase has ended."""
        self._done += 1
        if self._task is not None:
            self._progress.advance(self._task)
        now_s = time.monotonic()
        if not self._live and (now_s - self._told_s >= _LINE_EVERY_S or self._done == self._total):
            self._told_s = now_s
            self.say(f"{self._done} of {self._total} jobs have ended")

    def say(self, line: str) -> None:
        """Tell what happened, with the time since the phase began."""
        self._console.print(f"{time.monotonic() - self._began_s:7.1f} s  {line}", soft_wrap=True)
