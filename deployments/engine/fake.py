"""An engine whose every answer can be worked out by hand: no model, no torch, the same contract."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from cluster.core import ModelCard, SamplingParams
from deployments.engine.admission import check_job, open_checkpoint, seal
from deployments.engine.api import (
    CanvasCheckpoint,
    Commit,
    EngineJob,
    EngineStats,
    Progress,
    StepReport,
)


@dataclass(slots=True)
class _FakeJob:
    spec: EngineJob
    canvas_index: int
    step: int = 0
    prefilled: bool = False


class FakeEngine:
    """Token i of an answer is half + (seed + sum of the prompt + i) modulo half, where half = vocab_size // 2.

    A special token that comes out is replaced by the first id that is none. With `answer_tokens`, token number
    `answer_tokens` of every answer is EOS and padding follows. A canvas takes `steps_per_canvas` denoising steps, or
    1 + (seed + canvas index) modulo max_denoising_steps without it; never more than max_denoising_steps. After step
    s of n, the first s/n of a draft are final tokens and the rest is padding.

    `step_time_ms` paces: a step with work lasts that long in all, its own work included. The step number
    `fail_at_step` (from 1, over all jobs) raises RuntimeError.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        slots: int = 8,
        steps_per_canvas: int | None = None,
        step_time_ms: float = 0.0,
        answer_tokens: int | None = None,
        fail_at_step: int | None = None,
    ) -> None:
        if slots < 1 or (steps_per_canvas is not None and steps_per_canvas < 1):
            raise ValueError("slots and steps_per_canvas must be at least 1")
        self._card, self._slots = card, slots
        self._steps_per_canvas = steps_per_canvas
        self._step_time_s = step_time_ms / 1000
        self._answer_tokens, self._fail_at_step = answer_tokens, fail_at_step
        self._special = {*card.eos_token_ids, card.pad_token_id, card.bos_token_id}
        self._jobs: dict[str, _FakeJob] = {}
        self._steps = self._canvas_steps = self._canvases = self._prefill_tokens = 0

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def slots(self) -> int:
        return self._slots

    def start(self, job: EngineJob) -> None:
        """See `Engine.start`."""
        if job.job_id in self._jobs:
            raise KeyError(f"job {job.job_id} is active already")
        check_job(self._card, job)
        step = 0
        if job.checkpoint is not None:
            step = int(json.loads(open_checkpoint(self._card, job, job.checkpoint))["step"])
        if len(self._jobs) >= self._slots:
            raise RuntimeError(f"all {self._slots} slots are taken")
        self._jobs[job.job_id] = _FakeJob(job, len(job.committed), step)

    def step(self) -> StepReport:
        """See `Engine.step`."""
        if not self._jobs:
            return StepReport()
        end_s = time.monotonic() + self._step_time_s
        self._steps += 1
        if self._steps == self._fail_at_step:
            raise RuntimeError(f"fail_at_step: the fake engine breaks at step {self._steps}")
        progress, commits = [], []
        for job in list(self._jobs.values()):
            progress.append(self._denoise(job))
            if job.step >= self._steps_of(job):
                commits.append(self._commit(job))
        # Negative when the step's own work took longer than its time.
        time.sleep(max(end_s - time.monotonic(), 0.0) if self._step_time_s else 0.0)
        return StepReport(tuple(progress), tuple(commits))

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        self._jobs.pop(job_id, None)

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """See `Engine.checkpoint`."""
        job = self._jobs[job_id]
        if job.step == 0:
            return None
        payload = seal(json.dumps({"step": job.step}).encode())
        return CanvasCheckpoint(self._card.version, job.canvas_index, job.step, payload)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return EngineStats(
            denoising_steps=self._steps,
            canvas_steps=self._canvas_steps,
            canvases=self._canvases,
            prefill_tokens=self._prefill_tokens,
            active_jobs=len(self._jobs),
        )

    def lost(self) -> str | None:
        """See `Engine.lost`."""
        return None

    def close(self) -> None:
        """See `Engine.close`."""
        self._jobs.clear()

    def answer_canvas(self, prompt_tokens: tuple[int, ...], seed: int, index: int) -> tuple[int, ...]:
        """The canvas number `index` that this engine will commit, for tests to compare with."""
        size = self._card.canvas_tokens
        base = seed + sum(prompt_tokens)
        return tuple(self._token(base, place) for place in range(index * size, (index + 1) * size))

    def _token(self, base: int, place: int) -> int:
        if self._answer_tokens is not None and place >= self._answer_tokens:
            return self._card.eos_token_ids[0] if place == self._answer_tokens else self._card.pad_token_id
        half = self._card.vocab_size // 2
        token = half + (base + place) % half
        if token not in self._special:
            return token
        return next(other for other in range(self._card.vocab_size) if other not in self._special)

    def _steps_of(self, job: _FakeJob) -> int:
        sampling: SamplingParams = job.spec.sampling
        if self._steps_per_canvas is not None:
            return min(self._steps_per_canvas, sampling.max_denoising_steps)
        return 1 + (sampling.seed + job.canvas_index) % sampling.max_denoising_steps

    def _canvas(self, job: _FakeJob) -> tuple[int, ...]:
        return self.answer_canvas(job.spec.prompt_tokens, job.spec.sampling.seed, job.canvas_index)

    def _denoise(self, job: _FakeJob) -> Progress:
        if not job.prefilled:
            job.prefilled = True
            self._prefill_tokens += len(job.spec.prompt_tokens) + sum(map(len, job.spec.committed))
        job.step += 1
        self._canvas_steps += 1
        steps, size = self._steps_of(job), self._card.canvas_tokens
        accepted = min(size * job.step // steps, size)
        draft: tuple[int, ...] = ()
        if job.spec.wants_drafts:
            draft = self._canvas(job)[:accepted] + (self._card.pad_token_id,) * (size - accepted)
        return Progress(job.spec.job_id, job.canvas_index, job.step, self._entropy(job), accepted, draft)

    def _entropy(self, job: _FakeJob) -> float:
        return max(1.0 - job.step / self._steps_of(job), 0.0)

    def _commit(self, job: _FakeJob) -> Commit:
        canvas = self._canvas(job)
        canvases = self._card.canvases_for(job.spec.sampling.max_new_tokens)
        last = job.canvas_index + 1 >= canvases or not set(canvas).isdisjoint(self._card.eos_token_ids)
        commit = Commit(job.spec.job_id, job.canvas_index, canvas, job.step, self._entropy(job), last)
        self._canvases += 1
        if last:
            del self._jobs[job.spec.job_id]
        else:
            job.canvas_index, job.step = job.canvas_index + 1, 0
        return commit
