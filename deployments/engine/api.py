"""What a replica needs of an engine. One contract suite (tests/contract) runs against every engine.

An engine is driven by one thread. Between calls of `step` it holds still, so `start`, `stop` and `checkpoint` act
exactly at a denoising step's boundary.

    start(job) ──> step() ──> Progress per active job, at every step
                    │    └──> Commit when a canvas converged (its tokens are final)
                    └───────> the job leaves by itself after a Commit with `last=True`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.core import Image, ModelCard, SamplingParams


@dataclass(frozen=True, slots=True)
class CanvasCheckpoint:
    """A canvas in progress at a step boundary, enough to continue it bit for bit on another replica.

    `payload` is the engine's own serialised state (tokens, step, argmax history, self-conditioning embedding), with a
    checksum. `version` is the model version that wrote it: `start` refuses another version, or a damaged payload,
    with ValueError, and the caller replays the canvas from its start.
    """

    version: str
    canvas_index: int
    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class EngineJob:
    """A job to start, or to continue after its last committed canvas.

    `prompt_tokens` are token ids in [0, vocab_size). `committed` holds the whole `canvas_tokens` tokens of every
    canvas that is already final, in order. `wants_drafts` asks for the argmax canvas in every Progress. `images` are
    those of the prompt in its order, one for each of the card's image tokens in `prompt_tokens`: files whose
    headers were checked, which the replica has decoded already (pixels.py). An engine without vision refuses a job that
    has any.
    """

    job_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    committed: tuple[tuple[int, ...], ...] = ()
    checkpoint: CanvasCheckpoint | None = None
    wants_drafts: bool = False
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """One denoising step of one job. `step` counts from 1 within the canvas; `mean_entropy` is in nats a position.

    `draft_tokens` is the argmax canvas (`canvas_tokens` ids) when the job wants drafts, else empty.
    """

    job_id: str
    canvas_index: int
    step: int
    mean_entropy: float
    accepted_tokens: int
    draft_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """A converged canvas: `tokens` are its `canvas_tokens` final ids, EOS and what follows it included.

    `last` is true when the canvas holds an EOS or is the last that max_new_tokens allows; the engine has then let go
    of the job and its slot is free.
    """

    job_id: str
    canvas_index: int
    tokens: tuple[int, ...]
    denoising_steps: int
    mean_entropy: float
    last: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one call of `step` did, jobs in the order they were started. Empty when nothing was active."""

    progress: tuple[Progress, ...] = ()
    commits: tuple[Commit, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made, but for `active_jobs`, the pages and `ranks`, which are of now.

    `prefill_tokens` is context that was computed: prompts, and committed canvases of jobs that run or come back. Of
    `prefix_lookup_tokens`, the context that jobs came with, `prefix_hit_tokens` was in the cache already; an engine
    without prefix reuse leaves both 0. `pages_used` are those of active jobs, shared ones counted once.
    """

    denoising_steps: int = 0
    canvas_steps: int = 0
    canvases: int = 0
    prefill_tokens: int = 0
    active_jobs: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    ranks: int = 1


class Engine(Protocol):
    """One model on one tensor-parallel group, with `slots` jobs denoised together."""

    @property
    def card(self) -> ModelCard:
        """The model served; constant."""

    @property
    def slots(self) -> int:
        """How many jobs may be active at once; constant, at least 1."""

    def start(self, job: EngineJob) -> None:
        """Take a job; it takes part from the next step on.

        Raises ValueError when the job does not fit the model (empty prompt, token out of vocabulary, context too
        long, canvas of the wrong length, images that it cannot take), KeyError when the id is active already,
        RuntimeError when no slot is free.
        Nothing changes when it raises.
        """

    def step(self) -> StepReport:
        """Run one batched forward: pending prefill, and one denoising step of every job that is ready.

        Any exception means the engine is broken and must be replaced.
        """

    def stop(self, job_id: str) -> None:
        """Forget a job and free its slot and pages; unknown ids are ignored (the job may have just ended)."""

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """The canvas in progress, or None at a canvas boundary. Raises KeyError for an unknown job."""

    def stats(self) -> EngineStats:
        """Counters, cheap enough for every heartbeat."""

    def lost(self) -> str | None:
        """Why no step can succeed any more, as far as can be told without one; else None. Any thread may ask."""

    def close(self) -> None:
        """Give back memory and processes; may be called twice."""
