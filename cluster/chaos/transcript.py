"""What the readers of one job got, and what was wrong with the way they got it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.client import Answer, Committed, Draft, Event, Finished


@dataclass(frozen=True, slots=True)
class Seen:
    """A sign of progress that a reader saw, at `at_s` on its process's monotonic clock.

    A draft tells its replica and step, from 1; a canvas that was committed has the replica "" and the step 0.
    """

    at_s: float
    replica: str
    canvas_index: int
    step: int


@dataclass(frozen=True, slots=True)
class Heard:
    """A canvas as a reader got it."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    denoising_steps: int


@dataclass(slots=True)
class Transcript:
    """All that the readers of a job got. `faults` are canvases that came twice, out of order or not at all.

    `timelines` are the drafts and canvases that each call saw, call after call. `broken_calls` are errors that ended a
    call although the job went on; `problem` is why nobody read the job to its end. `whole` are the tokens of an answer
    that came in one piece.
    """

    job_id: str
    canvases: list[Heard] = field(default_factory=list)
    timelines: list[list[Seen]] = field(default_factory=list)
    whole: tuple[int, ...] | None = None
    finished: bool = False
    faults: list[str] = field(default_factory=list)
    broken_calls: list[str] = field(default_factory=list)
    problem: str | None = None
    asked_to_stop: bool = False

    @property
    def redone_steps(self) -> int:
        """Denoising steps of the same canvas that were seen again."""
        return redone_steps(seen for timeline in self.timelines for seen in timeline)

    def answer(self, answer: Answer) -> None:
        """Take in an answer that came in one piece."""
        self.whole = answer.token_ids
        self.finished = True


class Hearing:
    """One call that reads a job from a canvas on: every canvas must come once and in order."""

    def __init__(self, transcript: Transcript, from_canvas: int = 0) -> None:
        self._transcript = transcript
        self._timeline: list[Seen] = []
        transcript.timelines.append(self._timeline)
        self.next_canvas = from_canvas
        self.events = 0

    def hear(self, event: Event, at_s: float) -> None:
        """Take in the next event of the call, which came at `at_s`."""
        self.events += 1
        if isinstance(event, Draft):
            self._timeline.append(Seen(at_s, event.replica, event.canvas_index, event.step))
        elif isinstance(event, Committed):
            self._timeline.append(Seen(at_s, "", event.canvas_index, 0))
            self._canvas(event)
        elif isinstance(event, Finished):
            self._transcript.finished = True

    def _canvas(self, event: Committed) -> None:
        index, wanted = event.canvas_index, self.next_canvas
        if index != wanted:
            what = "came twice or late" if index < wanted else "came too early"
            self._transcript.faults.append(f"canvas {index} {what}, canvas {wanted} was next")
        self._transcript.canvases.append(Heard(index, event.token_ids, event.text, event.denoising_steps))
        self.next_canvas = max(wanted, index + 1)


def redone_steps(timeline: Iterable[Seen]) -> int:
    """How many of the steps, in the order in which they were seen, had been made before for the same canvas."""
    made: set[tuple[int, int]] = set()
    again = 0
    for seen in timeline:
        if not seen.replica:
            continue
        place = (seen.canvas_index, seen.step)
        again += place in made
        made.add(place)
    return again
