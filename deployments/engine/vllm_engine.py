"""The vllm engine: vLLM's own DiffusionGemma behind Easel's seam, a forward for each call of `step`."""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoint import check_degree, read_checkpoint
from cluster.core import ModelCard
from cluster.errors import EngineError
from deployments.engine.admission import check_job, open_checkpoint
from deployments.engine.api import CanvasCheckpoint, Commit, EngineJob, EngineStats, Progress, StepReport
from deployments.engine.pixels import decode
from deployments.engine.torch_tp.payload import CanvasState, pack, unpack
from deployments.engine.vllm_core import VllmCore, VllmSettings, request_plan
from deployments.engine.vllm_wire import Canvas, Go, Order, Saved, Snapshot, StepEvent, Stop

logger = logging.getLogger(__name__)

# How often a wait looks whether vLLM has ended a request that Easel still waits for.
LOOK_S = 1.0
# Of the entropy of scores that are all the same.
UNSURE_SHARE = 0.5


@dataclass(slots=True)
class _Job:
    spec: EngineJob
    key: str
    canvas_index: int
    step: int = 0


def load_engine(folder: str | Path, **settings: Any) -> VllmEngine:  # noqa: ANN401
    """Starts vLLM on a checkpoint folder; `settings` are the fields of VllmSettings.

    Raises CheckpointError, ConfigError, or EngineError when vLLM is not there or does not start.
    """
    checkpoint, chosen = read_checkpoint(folder), VllmSettings(**settings)
    check_degree(checkpoint.config, chosen.tp)
    chosen.context_tokens(checkpoint)
    chosen.forward_tokens(checkpoint.card.canvas_tokens)
    return VllmEngine(VllmCore(checkpoint, chosen))


class VllmEngine:
    """Implements `deployments.engine.api.Engine` on vLLM.

    vLLM runs ahead only as far as preparing its next forward: the plugin holds it until the next `step`. So a
    checkpoint is of exactly the last step that was reported.
    """

    _serial = itertools.count()

    def __init__(self, core: VllmCore, *, slots: int | None = None) -> None:
        """`slots` may be fewer than vLLM was started for. The engine owns `core`, and closes it."""
        checkpoint, self._core = core.checkpoint, core
        self._settings = core.settings
        self._slots = slots or core.settings.slots
        self._card = replace(checkpoint.card, max_context_tokens=core.settings.context_tokens(checkpoint))
        self._hidden_size = checkpoint.config.hidden_size
        self._exact_tokens = checkpoint.config.sliding_window_tokens - checkpoint.card.canvas_tokens
        self._warned = False
        self._jobs: dict[str, _Job] = {}
        self._denoising_steps = self._canvas_steps = self._canvases = 0
        self._prefill_tokens = self._lookup_tokens = self._hit_tokens = 0

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
        check_job(self._card, job, takes_images=True)
        images = decode(job.images)
        state = self._read_checkpoint(job)
        if len(self._jobs) >= self._slots:
            raise RuntimeError(f"all {self._slots} slots are taken")
        canvases = self._card.canvases_for(job.sampling.max_new_tokens)
        key = f"{job.job_id}#{next(self._serial)}"
        done = len(job.committed)
        self._warn_beyond_window(job, canvases)
        plan = request_plan(
            key, job.sampling, self._card.eos_token_ids, canvas_index=done, canvases=canvases, state=state
        )
        tokens = [*job.prompt_tokens, *itertools.chain.from_iterable(job.committed)]
        self._core.add(key, tokens, plan, (canvases - done) * self._card.canvas_tokens, images)
        self._jobs[job.job_id] = _Job(job, key, done, 0 if state is None else state.step)

    def step(self) -> StepReport:
        """See `Engine.step`. Raises EngineError when vLLM is dead, hangs, or computes what is no answer."""
        if not self._jobs:
            return StepReport()
        self._send(Go())
        event = self._next(StepEvent)
        # A forward may compute nothing but context.
        self._denoising_steps += bool(event.canvases)
        self._prefill_tokens += event.prefill_tokens
        self._lookup_tokens += event.context_tokens
        self._hit_tokens += event.cached_tokens
        canvases = {canvas.key: canvas for canvas in event.canvases}
        progress, commits = [], []
        for job in list(self._jobs.values()):
            canvas = canvases.get(job.key)
            if canvas is not None:
                progress.append(self._progress(job, canvas))
                commits += [self._commit(job, canvas)] if canvas.converged else []
        return StepReport(tuple(progress), tuple(commits))

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        job = self._jobs.pop(job_id, None)
        if job is not None and self._core.lost() is None:
            self._send(Stop(job.key))
            self._core.abort(job.key)

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """See `Engine.checkpoint`."""
        job = self._jobs[job_id]
        if job.step == 0:
            return None
        self._send(Snapshot(job.key))
        saved = self._next(Saved)
        if saved.state is None or saved.state.step != job.step:
            # A restored canvas whose context vLLM has not computed yet is as it came.
            return job.spec.checkpoint
        state = replace(saved.state, dtype=self._settings.run_dtype)
        return CanvasCheckpoint(self._card.version, job.canvas_index, job.step, pack(state))

    def stats(self) -> EngineStats:
        """See `Engine.stats`. Pages are vLLM's blocks; those that jobs share are counted for each of them."""
        return EngineStats(
            denoising_steps=self._denoising_steps,
            canvas_steps=self._canvas_steps,
            canvases=self._canvases,
            prefill_tokens=self._prefill_tokens,
            active_jobs=len(self._jobs),
            pages_used=sum(self._blocks(job) for job in self._jobs.values()),
            pages_total=self._core.blocks,
            prefix_lookup_tokens=self._lookup_tokens,
            prefix_hit_tokens=self._hit_tokens,
            ranks=self._core.ready.ranks,
        )

    def lost(self) -> str | None:
        """See `Engine.lost`."""
        return self._core.lost()

    def close(self) -> None:
        """See `Engine.close`."""
        for job_id in list(self._jobs):
            self.stop(job_id)
        self._core.close()

    def _read_checkpoint(self, job: EngineJob) -> CanvasState | None:
        if job.checkpoint is None:
            return None
        body = open_checkpoint(self._card, job, job.checkpoint)
        return unpack(body, self._card.canvas_tokens, self._hidden_size, self._settings.run_dtype)

    def _progress(self, job: _Job, canvas: Canvas) -> Progress:
        if math.isnan(canvas.mean_entropy):
            raise EngineError(
                f"vllm computed scores that are no numbers (canvas {canvas.canvas_index}, step {canvas.step})"
            )
        self._canvas_steps += 1
        job.step = canvas.step
        draft = tuple(canvas.argmax.tolist()) if job.spec.wants_drafts else ()
        accepted = canvas.accepted_tokens
        return Progress(job.spec.job_id, canvas.canvas_index, canvas.step, canvas.mean_entropy, accepted, draft)

    def _commit(self, job: _Job, canvas: Canvas) -> Commit:
        if (canvas.argmax == self._card.pad_token_id).all() and _all_the_same(canvas, self._card.vocab_size):
            raise EngineError(f"vllm computed a canvas of padding alone (canvas {canvas.canvas_index})")
        self._canvases += 1
        job.canvas_index, job.step = canvas.canvas_index + 1, 0
        if canvas.last:
            # vLLM ends the request by itself.
            del self._jobs[job.spec.job_id]
        return Commit(
            job_id=job.spec.job_id,
            canvas_index=canvas.canvas_index,
            tokens=tuple(canvas.argmax.tolist()),
            denoising_steps=canvas.step,
            mean_entropy=canvas.mean_entropy,
            last=canvas.last,
        )

    def _send(self, order: Order) -> None:
        try:
            self._core.words.send(order)
        except OSError as error:
            raise EngineError(self._core.lost() or f"vllm cannot be reached: {error}") from None

    def _next(self, kind: type[Any]) -> Any:  # noqa: ANN401 - a `kind`
        """The next word of vLLM's worker. Raises EngineError when there is none within the step timeout."""
        end_s = time.monotonic() + self._settings.step_timeout_s
        while True:
            word = self._core.words.next(LOOK_S)
            if isinstance(word, kind):
                return word
            lost = self._core.lost()
            if lost is not None:
                raise EngineError(lost)
            ended = [job.spec.job_id for job in self._jobs.values() if self._core.has_ended(job.key)]
            if word is None and ended:
                raise EngineError(f"vllm ended job {ended[0]} before its last canvas")
            if time.monotonic() > end_s:
                raise EngineError(f"vllm did not run a step within {self._settings.step_timeout_s:g} s")

    def _blocks(self, job: _Job) -> int:
        context = len(job.spec.prompt_tokens) + (job.canvas_index + 1) * self._card.canvas_tokens
        return -(-context // self._core.block_tokens)

    def _warn_beyond_window(self, job: EngineJob, canvases: int) -> None:
        """vLLM's canvases see fewer tokens of a long context than they should; said once (docs/engines.md)."""
        longest = len(job.prompt_tokens) + (canvases - 1) * self._card.canvas_tokens
        if self._warned or longest <= self._exact_tokens:
            return
        self._warned = True
        logger.warning(
            "job %s: contexts above %d tokens are attended to in part: vllm masks the sliding window on both sides",
            job.job_id,
            self._exact_tokens,
        )


def _all_the_same(canvas: Canvas, vocab_size: int) -> bool:
    """Whether its scores hardly tell tokens apart. Models do write canvases of padding alone, after an answer that was
    cut short or a prompt that means nothing, but they are sure of them."""
    return not canvas.mean_entropy < UNSURE_SHARE * math.log(vocab_size)
