"""The host's record of one active job: what is encoded, and how far the canvas in progress is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deployments.engine.api import EngineJob, Progress
from deployments.engine.randomness import initial_canvas, step_draws
from deployments.engine.torch_tp.cache import TRASH_ROW, JobPages
from deployments.engine.torch_tp.payload import CanvasState
from deployments.engine.torch_tp.plan import Tile
from deployments.engine.torch_tp.prefix import Part, next_part

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class ActiveJob:
    """A job in a slot. Invariant: `waiting` parts cover the positions from the encoded context to the context's end.

    `pages` hold its context. `step` counts the finished steps of the canvas in progress; `tokens` is that canvas as
    the next step reads it, `argmax` the last step's prediction.
    """

    spec: EngineJob
    slot: int
    canvases: int
    pages: JobPages
    canvas_rows: IntArray
    vocab_size: int
    prefilled: bool = False
    canvas_index: int = 0
    step: int = 0
    unchanged_steps: int = 0
    tokens: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    argmax: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    waiting: deque[Part] = field(default_factory=deque)
    last_part: Part | None = None

    @property
    def context_tokens(self) -> int:
        """Where the canvas in progress starts."""
        return 0 if self.last_part is None else self.last_part.end

    def begin(self, state: CanvasState | None) -> None:
        """Queues the prompt and every committed canvas, tiled as in a run without interruption, and takes its pages."""
        self._encode(np.array(self.spec.prompt_tokens, dtype=np.int64))
        for canvas in self.spec.committed:
            self._encode(np.array(canvas, dtype=np.int64))
        self.pages.count_lookup(self.context_tokens)
        self.adopt()
        self.canvas_index = len(self.spec.committed)
        if state is None:
            self._new_canvas()
            return
        self.step, self.unchanged_steps = state.step, state.unchanged_steps
        self.tokens, self.argmax = state.tokens, state.argmax

    def commit(self) -> None:
        """Makes the argmax canvas context, to be encoded in the next step, and starts the next canvas."""
        self._encode(self.argmax)
        self.canvas_index += 1
        self._new_canvas()

    def denoise_tile(self) -> Tile:
        return Tile(
            tokens=self.tokens,
            start=self.context_tokens,
            valid=len(self.canvas_rows),
            context_rows=self.pages.rows,
            write_rows=self.canvas_rows,
            slot=self.slot,
        )

    def adopt(self) -> None:
        """Lets go of waiting parts that another job has computed."""
        for _ in range(self.pages.adopt(self.waiting)):
            self.waiting.popleft()

    def next_tile(self) -> Tile:
        """The first waiting part, to be encoded by the step that is being made."""
        part = self.waiting.popleft()
        missing = len(self.canvas_rows) - len(part.tokens)
        rows = self.pages.rows
        self.pages.remember(part)
        return Tile(
            tokens=np.pad(part.tokens, (0, missing)),
            start=part.start,
            valid=len(part.tokens),
            context_rows=rows,
            write_rows=np.pad(rows[part.start : part.end], (0, missing), constant_values=TRASH_ROW),
        )

    def draws(self) -> tuple[NDArray[np.float64], IntArray]:
        """The next denoising step's random numbers; see `step_draws`."""
        seed = self.spec.sampling.seed
        return step_draws(seed, self.canvas_index, self.step + 1, len(self.canvas_rows), self.vocab_size)

    def progress(self, mean_entropy: float, accepted: int) -> Progress:
        """What the step that was just taken over looks like from outside."""
        draft = tuple(self.argmax.tolist()) if self.spec.wants_drafts else ()
        return Progress(self.spec.job_id, self.canvas_index, self.step, mean_entropy, accepted, draft)

    def advance(self, argmax: IntArray, next_canvas: IntArray) -> None:
        """Takes over one denoising step's results."""
        same = self.step > 0 and np.array_equal(argmax, self.argmax)
        self.unchanged_steps = self.unchanged_steps + 1 if same else 0
        self.step += 1
        self.argmax, self.tokens = argmax, next_canvas

    def converged(self, mean_entropy: float) -> bool:
        """Stable and confident, or at the step cap (the reference's StableAndConfidentStoppingCriteria).

        The argmax equals those of the last `stability_threshold` steps exactly when it has not changed for as many.
        """
        sampling = self.spec.sampling
        if self.step >= sampling.max_denoising_steps:
            return True
        stable = self.unchanged_steps >= sampling.stability_threshold
        return stable and mean_entropy < sampling.confidence_threshold

    def _new_canvas(self) -> None:
        self.step = self.unchanged_steps = 0
        canvas_tokens = len(self.canvas_rows)
        self.tokens = initial_canvas(self.spec.sampling.seed, self.canvas_index, canvas_tokens, self.vocab_size)
        self.argmax = np.full(canvas_tokens, -1, dtype=np.int64)

    def _encode(self, tokens: IntArray) -> None:
        size = len(self.canvas_rows)
        for first in range(0, len(tokens), size):
            self.last_part = next_part(self.last_part, tokens[first : first + size])
            self.waiting.append(self.last_part)
