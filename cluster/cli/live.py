"""The canvas in the terminal: what is committed stands solid, the draft behind it is dim and changes at every
step.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.client import Accepted, Committed, Draft, Event, Finished
from cluster.core import Usage

REFRESHES_PER_S = 15
PIPE_COLUMNS = 160


def on_terminal() -> bool:
    """True when a person looks at standard output. rich's own test can be forced by the environment, and a live view
    in a pipe helps nobody.
    """
    return sys.stdout.isatty()


def make_console() -> Console:
    """Standard output; wide where it is no terminal, so that tables are not cut there."""
    # Without markup: brackets in a prompt or a tenant are text, not styles.
    if on_terminal():
        return Console(markup=False, highlight=False)
    return Console(width=PIPE_COLUMNS, force_terminal=False, markup=False, highlight=False)


@dataclass(slots=True)
class Canvas:
    """What a person sees of one job; `apply` brings it forward by one event."""

    committed: str = ""
    draft: Draft | None = None
    canvases: int = 0
    accepted: Accepted | None = None
    finished: Finished | None = None
    events: list[Event] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Take in the next event of the job's stream."""
        if isinstance(event, Draft):
            self.draft = event
            return
        self.events.append(event)
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, Committed):
            self.committed += event.text
            self.canvases = event.canvas_index + 1
            self.draft = None
        else:
            self.finished = event

    def body(self) -> Text:
        """The answer so far."""
        text = Text(printable(self.committed))
        if self.draft is not None:
            text.append(printable(self.draft.text), style="dim")
        return text

    def footer(self) -> Text:
        """One line on where the job is."""
        if self.finished is not None:
            words = [*usage_words(self.finished.usage), self.finished.replica]
        elif self.draft is not None:
            words = [
                f"canvas {self.draft.canvas_index}",
                f"step {self.draft.step}",
                f"entropy {self.draft.mean_entropy:.3f} nats",
                f"{self.draft.accepted_tokens} accepted",
                self.draft.replica,
            ]
        else:
            words = [f"{self.canvases} canvases" if self.canvases else "waiting for a slot"]
        return Text(" · ".join(word for word in words if word), style="cyan")

    def render(self) -> RenderableType:
        """The answer and the line below it."""
        return Group(self.body(), self.footer())


def usage_words(usage: Usage) -> list[str]:
    """What a job took, in a few words."""
    return [
        f"{usage.generated_tokens} tokens",
        f"{usage.canvases} canvases",
        f"{usage.denoising_steps} steps",
        f"{usage.queue_ms + usage.run_ms} ms",
    ]


def printable(text: str) -> str:
    """The text with control characters as dots: a model's escape sequences must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


async def show_live(console: Console, events: AsyncIterator[Event]) -> Canvas:
    """Show a job while it runs; returns what was shown last, which stays on the screen."""
    canvas = Canvas()
    with Live(canvas.render(), console=console, refresh_per_second=REFRESHES_PER_S) as live:
        async for event in events:
            canvas.apply(event)
            live.update(canvas.render())
    return canvas
