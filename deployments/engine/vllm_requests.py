"""Inside vLLM's worker: what the host knows of the requests there, and how a step's outcome comes to it.

Nothing here is vLLM's; what is, is in vllm_plugin.py.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.core import SamplingParams
from deployments.engine.randomness import initial_canvas
from deployments.engine.torch_tp.payload import CanvasState
from deployments.engine.vllm_wire import Canvas, StepEvent, WorkerEnd


class Phase(Enum):
    """Of a request, as the host knows it before a forward."""

    CONTEXT = 0
    DENOISE = 1
    COMMIT = 2
    DONE = 3


@dataclass(slots=True)
class Request:
    """The host's record of a request in one of vLLM's slots. `step` counts the finished steps of its canvas."""

    key: str
    sampling: SamplingParams
    eos: tuple[int, ...]
    canvases: int
    canvas_index: int
    state: CanvasState | None
    phase: Phase = Phase.CONTEXT
    step: int = 0

    @classmethod
    def of(cls, plan: Mapping[str, Any], commits_since: int) -> Request:
        """From what the engine put into extra_args. vLLM brings a request back, with what it has committed since, when
        it ran out of memory in between: its canvas then starts again."""
        state = plan["state"]
        return cls(
            key=plan["key"],
            sampling=SamplingParams(**plan["sampling"]),
            eos=tuple(plan["eos"]),
            canvases=plan["canvases"],
            canvas_index=plan["canvas_index"] + commits_since,
            state=_state_of(state) if state and not commits_since else None,
        )

    def take(self, converged: bool, last: bool) -> None:
        """One more step of the canvas is done."""
        self.step += 1
        if converged:
            self.phase = Phase.DONE if last else Phase.COMMIT

    def next_canvas(self) -> None:
        self.canvas_index += 1
        self.step, self.phase = 0, Phase.DENOISE

    def noise(self, canvas_index: int, canvas_tokens: int, vocab_size: int) -> NDArray[np.int64]:
        return initial_canvas(self.sampling.seed, canvas_index, canvas_tokens, vocab_size)


def _state_of(plan: Mapping[str, Any]) -> CanvasState:
    tokens = np.frombuffer(plan["tokens"], dtype=np.int64)
    return CanvasState(
        tokens=tokens,
        argmax=np.frombuffer(plan["argmax"], dtype=np.int64),
        soft=np.frombuffer(plan["soft"], dtype=np.float32).reshape(len(tokens), -1),
        step=plan["step"],
        unchanged_steps=plan["unchanged_steps"],
        dtype="",
    )


class Outcome:
    """What the device decided in one forward, on its way to the host.

    `argmax` int64 [requests, canvas_tokens]; `numbers` float64 [4, requests]: mean entropy, accepted positions,
    converged, last. `requests` are those that denoised.
    """

    def __init__(self, requests: Sequence[Request], argmax: Tensor, numbers: Tensor, event: StepEvent) -> None:
        self._requests, self._event = requests, event
        self._steps = [(request.canvas_index, request.step + 1) for request in requests]
        self._argmax, self._numbers = _to_host(argmax), _to_host(numbers)
        self._copied: Any = None
        if argmax.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def settle(self) -> None:
        """Brings the host's records up to date."""
        self.wait()
        for request, converged, last in zip(self._requests, *self._numbers[2:].bool().tolist(), strict=True):
            request.take(converged, last)

    def event(self) -> StepEvent:
        entropy, accepted, converged, last = self._numbers.tolist()
        canvases = tuple(
            Canvas(
                key=request.key,
                canvas_index=canvas_index,
                step=step,
                mean_entropy=entropy[i],
                accepted_tokens=int(accepted[i]),
                argmax=self._argmax[i].numpy(),
                converged=bool(converged[i]),
                last=bool(last[i]),
            )
            for i, (request, (canvas_index, step)) in enumerate(zip(self._requests, self._steps, strict=True))
        )
        return replace(self._event, canvases=canvases)


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Reporter:
    """Sends outcomes as soon as the device has them, while the thread that runs forwards prepares the next one."""

    def __init__(self, link: WorkerEnd) -> None:
        self._link = link
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        threading.Thread(target=self._run, name="easel-reports", daemon=True).start()

    def put(self, outcome: Outcome) -> None:
        self._outcomes.put(outcome)

    def _run(self) -> None:
        while True:
            outcome = self._outcomes.get()
            outcome.wait()
            self._link.report(outcome.event())
