"""Denoising steps that are recorded once per shape and replayed: CUDA graphs, behind a recorder that tests can replace.

A step launches many small kernels; a graph launches them as one. It repeats exactly what was recorded, on the
same addresses: so a recording has input tensors of its own, and every replay copies that step's inputs into them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from deployments.engine.torch_tp.plan import AttentionGroup, StepPlan
from deployments.engine.torch_tp.sampler import StepInputs

log = logging.getLogger(__name__)
# Recording costs more than a step, so shapes that come by once are not worth it. A guess: not measured on a GPU.
RECORD_AT_STEP = 3
# Bounds the recordings' own inputs, of which the masks are the most.
MAX_RECORDINGS = 16
MAX_COUNTED_SHAPES = 512

# int64 [2, tiles, rows] argmax and next canvas; float64 [2, tiles] mean entropy and accepted positions.
Outputs = tuple[Tensor, Tensor]
Shape = tuple[int, tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True, slots=True)
class StepWork:
    """All that a denoising step reads and that changes between steps, on the run device. `before` and `after` int64
    [denoise tiles]: the rows of the self-conditioning memory that it reads and writes. Weights, KV cache and that
    memory itself stay where they are."""

    plan: StepPlan
    before: Tensor
    after: Tensor
    inputs: StepInputs

    @property
    def shape(self) -> Shape:
        """What two steps must have in common for one recording to do both."""
        plan = self.plan
        return len(plan.tokens), _bounds(plan.full), _bounds(plan.sliding)

    def places(self) -> Iterator[Tensor]:
        """What stays alike while the same canvases go on."""
        yield from (self.plan.positions, self.plan.write_rows)
        for group in (*self.plan.full, *self.plan.sliding):
            yield from (group.key_rows, group.mask)

    def changes(self) -> Iterator[Tensor]:
        """What is another in every step."""
        inputs = self.inputs
        yield from (self.plan.tokens, self.before, self.after)
        yield from (inputs.temperatures, inputs.entropy_bounds, inputs.uniforms, inputs.replacements)


Run = Callable[[StepWork], Outputs]
Replay = Callable[[], Outputs]


class Recorder(Protocol):
    """How steps are recorded on some device."""

    def warm_up(self, run: Replay) -> Outputs:
        """Runs it in earnest, so that whatever is made at a first use is there before it is recorded."""

    def record(self, run: Replay) -> Replay:
        """Calls `run` without executing what it launches; the result executes it. Raises RuntimeError when something
        in it cannot be recorded."""

    def release(self) -> None:
        """Gives back the memory of recordings that nobody holds any more."""


class CudaRecorder:
    """CUDA graphs. All share one memory pool: what a graph computes on the way is dead when it ends, and its outputs
    are read before the next is replayed, so that it does not matter in which order they run."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, run: Replay) -> Outputs:
        # On the stream that records: cuBLAS keeps a workspace for each.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def record(self, run: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its own stream current when the recording fails; the outer context does not.
        # thread_local: what other threads of this process do must not spoil it.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def release(self) -> None:
        torch.cuda.empty_cache()


class Recording:
    """One recorded step: its own inputs, and how to run it on what they hold."""

    def __init__(self, work: StepWork, replay: Replay) -> None:
        self._work, self._replay = work, replay
        # Only compared with: holding it keeps its identity from being used again.
        self._holds: Tensor | None = None

    def __call__(self, work: StepWork) -> Outputs:
        _copy(self._work.changes(), work.changes())
        # A plan that goes on has the same tensors; masks are large.
        if work.plan.positions is not self._holds:
            _copy(self._work.places(), work.places())
            self._holds = work.plan.positions
        return self._replay()


class StepGraphs:
    """Runs steps in which every tile denoises from recordings, and all others as they come.

    Invariant: a step's work is done exactly once. A shape's first steps run as they come; the step at which it is
    recorded is the warm-up, and recording executes nothing.
    """

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self._run, self._recorder = run, recorder
        self._recordings: OrderedDict[Shape, Recording] = OrderedDict()
        self._steps: OrderedDict[Shape, int] = OrderedDict()
        self._given_up = False

    def __call__(self, work: StepWork) -> Outputs:
        if self._given_up or work.plan.denoising is not None:
            return self._run(work)
        shape = work.shape
        recording = self._recordings.get(shape)
        if recording is not None:
            self._recordings.move_to_end(shape)
            return recording(work)
        if self._count(shape) < RECORD_AT_STEP:
            return self._run(work)
        return self._record(shape, work)

    def give_up(self, why: BaseException) -> bool:
        """Runs everything as it comes from now on, and returns the recordings' memory; whether there was any use."""
        if self._given_up:
            return False
        log.warning("denoising steps run without CUDA graphs from now on: %s", why)
        self._given_up = True
        self._recordings.clear()
        self._recorder.release()
        return True

    def _record(self, shape: Shape, work: StepWork) -> Outputs:
        own = _own(work)
        run = partial(self._run, own)
        outputs = self._recorder.warm_up(run)
        while len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        try:
            self._recordings[shape] = Recording(own, self._recorder.record(run))
        except RuntimeError as error:
            self.give_up(error)
        return outputs

    def _count(self, shape: Shape) -> int:
        """How often this shape has come by, this time included; the longest unseen are forgotten."""
        self._steps[shape] = self._steps.pop(shape, 0) + 1
        if len(self._steps) > MAX_COUNTED_SHAPES:
            self._steps.popitem(last=False)
        return self._steps[shape]


def _bounds(groups: tuple[AttentionGroup, ...]) -> tuple[tuple[int, int, int], ...]:
    """First and last tile, and padded keys, of each group."""
    return tuple((group.first, group.last, group.mask.shape[-1]) for group in groups)


def _own(work: StepWork) -> StepWork:
    """A copy that shares no memory with it."""
    plan, inputs = work.plan, work.inputs

    def groups(given: tuple[AttentionGroup, ...]) -> tuple[AttentionGroup, ...]:
        return tuple(replace(group, key_rows=group.key_rows.clone(), mask=group.mask.clone()) for group in given)

    return StepWork(
        plan=StepPlan(
            tokens=plan.tokens.clone(),
            positions=plan.positions.clone(),
            write_rows=plan.write_rows.clone(),
            denoising=None,
            full=groups(plan.full),
            sliding=groups(plan.sliding),
        ),
        before=work.before.clone(),
        after=work.after.clone(),
        inputs=StepInputs(
            temperatures=inputs.temperatures.clone(),
            entropy_bounds=inputs.entropy_bounds.clone(),
            uniforms=inputs.uniforms.clone(),
            replacements=inputs.replacements.clone(),
        ),
    )


def _copy(targets: Iterator[Tensor], sources: Iterator[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
