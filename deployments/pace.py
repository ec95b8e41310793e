"""How fast a replica denoises and how full it is, over the last while, from its engine's counters."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from deployments.engine.api import EngineStats

# The rate follows the load; steps per canvas vary from canvas to canvas, and their mean needs many.
RATE_OVER_S = 10.0
STEPS_OVER_S = 600.0


@dataclass(frozen=True, slots=True)
class _Mark:
    now_s: float
    canvas_steps: int
    canvases: int
    active: int


class Pace:
    """Takes marks and tells means. Denoising steps, of which there are many, tell canvases/s by their mean."""

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque()

    def mark(self, now_s: float, stats: EngineStats) -> None:
        """Note the counters at `now_s`, by a clock that goes forward."""
        self._marks.append(_Mark(now_s, stats.canvas_steps, stats.canvases, stats.active_jobs))
        while self._marks[0].now_s < now_s - STEPS_OVER_S:
            self._marks.popleft()

    @property
    def active(self) -> float:
        """Mean number of active canvases over RATE_OVER_S; 0 before the first mark."""
        recent = self._recent()
        return sum(mark.active for mark in recent) / len(recent) if recent else 0.0

    @property
    def canvases_per_s(self) -> float:
        """Over RATE_OVER_S; 0 while no canvas was made that tells how many steps one takes."""
        recent = self._recent()
        if len(recent) < 2:
            return 0.0
        first, last = recent[0], recent[-1]
        passed_s, per_canvas = last.now_s - first.now_s, self._steps_per_canvas()
        return (last.canvas_steps - first.canvas_steps) / passed_s / per_canvas if passed_s > 0 < per_canvas else 0.0

    def _steps_per_canvas(self) -> float:
        first, last = self._marks[0], self._marks[-1]
        canvases = last.canvases - first.canvases
        return (last.canvas_steps - first.canvas_steps) / canvases if canvases else 0.0

    def _recent(self) -> list[_Mark]:
        if not self._marks:
            return []
        return [mark for mark in self._marks if mark.now_s >= self._marks[-1].now_s - RATE_OVER_S]
