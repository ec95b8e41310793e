"""Easel inside vLLM's worker: the one file that touches what vLLM does not promise to keep (docs/adr/0018 lists it).

vLLM's model and its attention stay as they are. What changes is what happens around a forward: a request's random
numbers are its own (randomness.py), every step is reported, a forward waits until the engine asks for it, and a canvas
in progress can be taken out and put back. Every rank runs all of this on the same numbers; rank 0 talks to the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models.diffusion_gemma import (
    DiffusionGemmaForConditionalGeneration,
    DiffusionGemmaModelState,
    DiffusionSampler,
)
from vllm.model_executor.models.diffusion_gemma_sampler import sample_row_stats
from vllm.utils.torch_utils import async_tensor_h2d

from cluster.core import SamplingParams
from deployments.engine.randomness import initial_canvas, step_draws
from deployments.engine.torch_tp.payload import CanvasState
from deployments.engine.torch_tp.sampler import accepted_positions, inverse_cdf, temperature
from deployments.engine.vllm_wire import EXTRA, Address, Canvas, StepEvent, WorkerEnd

# What the working copies of a tile's scores may take of the free memory of a GPU, and how many there are at once.
TILE_MEMORY_SHARE = 0.5
TILE_COPIES = 3


class EaselDiffusionGemma(DiffusionGemmaForConditionalGeneration):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's model; where Easel drives it, with Easel's state and sampler."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: ANN401
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._driven = isinstance(vllm_config.additional_config, Address)

    def get_model_state_cls(self) -> type[Any]:
        return EaselState if self._driven else DiffusionGemmaModelState


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

    `argmax` int64 [requests, canvas_tokens]; `numbers` float64 [4, requests]: mean entropy, accepted positions, converged,
    last. `requests` are those that denoised.
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
        return StepEvent(
            canvases, self._event.prefill_tokens, self._event.context_tokens, self._event.cached_tokens
        )


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


class EaselState(DiffusionGemmaModelState):  # type: ignore[misc]
    """Waits before forwards, restores and snapshots canvases, and knows the requests in vLLM's slots."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:  # noqa: ANN401
        super().__init__(vllm_config, model, encoder_cache, device)
        self.requests: dict[int, Request] = {}
        self.unchanged = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.context_tokens = self.cached_tokens = 0
        self.wanted = False
        self._outcome: Outcome | None = None
        self._real = False
        group = get_tp_group()
        self._link: WorkerEnd | None = None
        if group.rank_in_group == 0:
            self._link = WorkerEnd(vllm_config.additional_config, str(device), group.world_size)
            self._reporter = Reporter(self._link)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:  # noqa: ANN401
        base, rejection = super().custom_sampler(sampler)
        return EaselSampler(base, self), rejection

    def add_request(self, req_index: int, new_req_data: Any) -> None:  # noqa: ANN401
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        plan = (params.extra_args or {}).get(EXTRA) if params is not None else None
        if plan is None:  # one of vLLM's own, to warm up
            return
        since = len(new_req_data.prefill_token_ids) - len(new_req_data.prompt_token_ids)
        self.requests[req_index] = Request.of(plan, since // self.diffusion_states.canvas_length)
        self.unchanged[req_index] = 0
        self.context_tokens += len(new_req_data.prefill_token_ids)
        self.cached_tokens += new_req_data.num_computed_tokens

    def remove_request(self, req_id: str) -> None:
        request = self.requests.pop(self._req_id_to_index.get(req_id, -1), None)
        super().remove_request(req_id)
        if request is not None and self._link is not None:
            self._link.forget(request.key)

    def preprocess_state(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Called for batches of requests, not for the dummies of profiling and graph capture."""
        super().preprocess_state(*args, **kwargs)
        self._real = True

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:  # noqa: ANN401
        """The last call before a forward is launched: all that can be prepared is on its way when we wait."""
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if self._real:
            self._real = False
            self._wait(input_batch.idx_mapping_np[: input_batch.num_reqs].tolist())
        return inputs

    def report(self, outcome: Outcome) -> None:
        """Every rank's records wait for it; rank 0 sends it if the engine waits for it too."""
        self._outcome = outcome
        self.context_tokens = self.cached_tokens = 0
        if self._link is not None and self.wanted:
            self._reporter.put(outcome)

    def _wait(self, slots: Sequence[int]) -> None:
        if self._outcome is not None:
            self._outcome.settle()
            self._outcome = None
        requests = [self.requests[slot] for slot in slots if slot in self.requests]
        keys = {request.key for request in requests if request.phase is not Phase.DONE}
        self.wanted = self._link is not None and self._link.wait(keys, self._snapshot)

    def _snapshot(self, key: str) -> CanvasState | None:
        slot = next((slot for slot, request in self.requests.items() if request.key == key), None)
        if slot is None or self.requests[slot].phase is not Phase.DENOISE or not self.requests[slot].step:
            return None
        states = self.diffusion_states
        return CanvasState(
            tokens=states.canvas[slot].cpu().numpy(),
            argmax=states.argmax_canvas[slot].cpu().numpy(),
            soft=states.self_conditioning_embeds[slot].cpu().numpy(),
            step=self.requests[slot].step,
            unchanged_steps=int(self.unchanged[slot]),
            dtype="",
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """Of denoising requests: `argmax`, `next_canvas` int64 and `entropy` float32 [requests, canvas_tokens], `accepted`
    bool alike; `soft` [requests, canvas_tokens, hidden]."""

    argmax: Tensor
    next_canvas: Tensor
    entropy: Tensor
    accepted: Tensor
    soft: Tensor


class EaselSampler(DiffusionSampler):  # type: ignore[misc]
    """One denoising step of every canvas in the batch, with its own request's random numbers and settings."""

    def __init__(self, base: Any, state: EaselState) -> None:  # noqa: ANN401
        # vLLM has built the sampler; this one takes its buffers over.
        self.__dict__.update(base.__dict__)
        self._state = state

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None) -> Any:  # noqa: ANN401
        slots = input_batch.idx_mapping_np[: input_batch.num_reqs].tolist()
        if any(slot not in self._state.requests for slot in slots):
            return super().__call__(logits, input_batch, draft_logits)
        widths = np.diff(input_batch.cu_num_logits_np[: len(slots) + 1])
        decoding = np.flatnonzero(widths)
        if (widths[decoding] != self.canvas_length).any():
            raise RuntimeError(f"vllm scheduled a part of a canvas: {widths.tolist()} rows")
        rows = {slots[row]: row for row in decoding.tolist()}
        by_phase = {phase: [s for s in rows if self._state.requests[s].phase is phase] for phase in Phase}
        waiting, ready = by_phase[Phase.COMMIT], by_phase[Phase.DENOISE]
        prefill_tokens = int(input_batch.num_scheduled_tokens.sum()) - (len(rows) - len(waiting)) * self.canvas_length
        event = StepEvent((), prefill_tokens, self._state.context_tokens, self._state.cached_tokens)
        if not rows:
            output = self._handle_prefill(input_batch, logits.device)
            self._state.report(self._nothing(event))
            return output
        self._finish_prefills(input_batch, np.flatnonzero(widths == 0))
        sampled, emitted = self._sampled[: len(slots)].zero_(), self._num_sampled[: len(slots)].zero_()
        # Logits come in the order of the batch, a canvas for each row that decodes.
        place = {slot: index for index, slot in enumerate(rows)}
        outcome = self._nothing(event)
        if ready:
            outcome = self._denoise(logits, ready, rows, place, (sampled, emitted), event)
        if waiting:
            self._commit(waiting, rows, (sampled, emitted))
        every = input_batch.idx_mapping[: len(slots)].long()
        self.req_states.draft_tokens[every, : self.canvas_length] = self.diffusion_states.canvas[every]
        self._state.report(outcome)
        return self._build_output(input_batch, sampled, emitted, widths, logits.device)

    def _nothing(self, event: StepEvent) -> Outcome:
        return Outcome((), torch.empty(0, self.canvas_length, dtype=torch.int64), torch.empty(4, 0), event)

    def _finish_prefills(self, input_batch: Any, prefill_indices_np: NDArray[Any]) -> None:  # noqa: ANN401
        """Requests whose context is computed after this forward begin their canvas, or go on with a restored one."""
        if any(s not in self._state.requests for s in input_batch.idx_mapping_np[prefill_indices_np].tolist()):
            super()._finish_prefills(input_batch, prefill_indices_np)
            return
        done = (
            input_batch.num_computed_prefill_tokens_np[prefill_indices_np]
            + input_batch.num_scheduled_tokens[prefill_indices_np]
            >= input_batch.prefill_len_np[prefill_indices_np]
        )
        states = self.diffusion_states
        for slot in input_batch.idx_mapping_np[prefill_indices_np[done]].tolist():
            request = self._state.requests[slot]
            request.phase = Phase.DENOISE
            if request.state is None:
                tokens = request.noise(request.canvas_index, self.canvas_length, self.vocab_size)
            else:
                tokens = self._restore(slot, request, request.state)
            states.canvas[slot] = self._upload(tokens)
            self.req_states.draft_tokens[slot, : self.canvas_length] = states.canvas[slot]
            states.is_encoder_phase[slot].fill_(False)

    def _restore(self, slot: int, request: Request, state: CanvasState) -> NDArray[np.int64]:
        request.step, request.state = state.step, None
        self._state.unchanged[slot] = state.unchanged_steps
        self.diffusion_states.argmax_canvas[slot] = self._upload(state.argmax)
        self.diffusion_states.self_conditioning_embeds[slot] = self._upload(state.soft)
        return state.tokens

    def _denoise(
        self,
        logits: Tensor,
        ready: Sequence[int],
        rows: Mapping[int, int],
        place: Mapping[int, int],
        out: tuple[Tensor, Tensor],
        event: StepEvent,
    ) -> Outcome:
        """One step of the canvases in the slots `ready`: decide, and write what the next forward reads."""
        requests = [self._state.requests[slot] for slot in ready]
        decision = self._decide(logits, requests, [place[slot] for slot in ready])
        slots, states, unchanged = self._upload(np.array(ready)), self.diffusion_states, self._state.unchanged
        begun = self._upload(np.array([request.step > 0 for request in requests]))
        same = (decision.argmax == states.argmax_canvas[slots]).all(dim=-1) & begun
        unchanged[slots] = torch.where(same, unchanged[slots] + 1, 0)
        mean_entropy = decision.entropy.mean(dim=-1)
        capped, stability, confidence, final = self._limits(requests)
        converged = capped | ((unchanged[slots] >= stability) & (mean_entropy < confidence))
        eos = torch.isin(decision.argmax, self._upload(np.array(requests[0].eos))).any(dim=-1)
        last = converged & (final | eos)
        states.canvas[slots] = torch.where(converged[:, None], decision.argmax, decision.next_canvas)
        states.argmax_canvas[slots] = decision.argmax
        # The forward that commits a canvas reads its tokens alone.
        kept = torch.where(converged[:, None, None], 0.0, decision.soft)
        states.self_conditioning_embeds[slots] = kept.to(states.self_conditioning_embeds.dtype)
        states.is_encoder_phase[slots] = converged & ~last
        sampled, emitted = out
        batch_rows = self._upload(np.array([rows[slot] for slot in ready]))
        sampled[batch_rows] = (decision.argmax * last[:, None]).to(sampled.dtype)
        emitted[batch_rows] = (last * self.canvas_length).to(emitted.dtype)
        numbers = torch.stack([mean_entropy.double(), decision.accepted.sum(dim=-1).double(), converged.double(), last])
        return Outcome(requests, decision.argmax, numbers, event)

    def _commit(self, waiting: Sequence[int], rows: Mapping[int, int], out: tuple[Tensor, Tensor]) -> None:
        """The forward has written these canvases to the cache: hand them to vLLM, and begin the next ones."""
        requests = [self._state.requests[slot] for slot in waiting]
        slots, batch_rows = self._upload(np.array(waiting)), self._upload(np.array([rows[slot] for slot in waiting]))
        states, (sampled, emitted) = self.diffusion_states, out
        sampled[batch_rows] = states.argmax_canvas[slots].to(sampled.dtype)
        emitted[batch_rows] = self.canvas_length
        noise = [r.noise(r.canvas_index + 1, self.canvas_length, self.vocab_size) for r in requests]
        states.canvas[slots] = self._upload(np.stack(noise))
        states.is_encoder_phase[slots] = False
        self._state.unchanged[slots] = 0
        for request in requests:
            request.next_canvas()

    def _limits(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whether this is the last step that the budget allows, stability and confidence thresholds, and whether the
        canvas is the last one; each [requests]."""
        params = [request.sampling for request in requests]
        steps = zip(requests, params, strict=True)
        return (
            self._upload(np.array([r.step + 1 >= p.max_denoising_steps for r, p in steps])),
            self._upload(np.array([p.stability_threshold for p in params])),
            self._upload(np.array([p.confidence_threshold for p in params], dtype=np.float32)),
            self._upload(np.array([r.canvas_index + 1 >= r.canvases for r in requests])),
        )

    def _decide(self, logits: Tensor, requests: Sequence[Request], places: Sequence[int]) -> Decision:
        """Over tiles of requests that fit the memory; `places` says which canvas of the logits is whose."""
        size, parts = self._tile_requests(logits), []
        canvases = logits.view(-1, self.canvas_length, logits.shape[-1])
        for first in range(0, len(requests), size):
            mine = places[first : first + size]
            contiguous = mine == list(range(mine[0], mine[0] + len(mine)))
            part = canvases[mine[0] : mine[0] + len(mine)] if contiguous else canvases[mine]
            parts.append(self._decide_tile(part, requests[first : first + size]))
        names = Decision.__dataclass_fields__
        return Decision(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _tile_requests(self, logits: Tensor) -> int:
        if not logits.is_cuda:
            return len(logits)
        free_bytes = torch.accelerator.get_memory_info()[0] * TILE_MEMORY_SHARE
        return max(1, int(free_bytes // (self.canvas_length * self.vocab_size * 4 * TILE_COPIES)))

    def _decide_tile(self, logits: Tensor, requests: Sequence[Request]) -> Decision:
        """logits: [requests, canvas_tokens, vocab], soft-capped."""
        draws = [
            step_draws(r.sampling.seed, r.canvas_index, r.step + 1, self.canvas_length, self.vocab_size) for r in requests
        ]
        heats = np.array([temperature(r.sampling, r.step + 1) for r in requests], dtype=np.float32)
        bounds = np.array([[r.sampling.entropy_bound] for r in requests], dtype=np.float32)
        probabilities, argmax, entropy = self._statistics(logits, self._upload(heats))
        sampled = inverse_cdf(probabilities, self._upload(np.stack([uniforms for uniforms, _ in draws])))
        accepted = accepted_positions(entropy, self._upload(bounds))
        replacements = self._upload(np.stack([tokens for _, tokens in draws]))
        return Decision(
            argmax=argmax,
            next_canvas=torch.where(accepted, sampled, replacements),
            entropy=entropy,
            accepted=accepted,
            soft=self._soft(probabilities),
        )

    def _statistics(self, logits: Tensor, heats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [requests, canvas_tokens, vocab], argmax and entropy [requests, canvas_tokens]."""
        shape = logits.shape
        if logits.is_cuda:
            flat = logits.reshape(-1, shape[-1])
            stats = sample_row_stats(flat, heats, self.canvas_length, 0, self.embed_weight.dtype)
            return stats[3].view(shape), stats[0].view(shape[:2]), stats[2].view(shape[:2])
        scores = logits.float() / heats[:, None, None]
        log_probabilities = torch.log_softmax(scores, dim=-1)
        probabilities = log_probabilities.exp()
        return probabilities, scores.argmax(dim=-1), log_probabilities.mul_(probabilities).sum(dim=-1).neg_()

    def _soft(self, probabilities: Tensor) -> Tensor:
        """The next step's self-conditioning; each rank has a part of the vocabulary's embeddings."""
        local = probabilities[..., self.sc_vocab_start : self.sc_vocab_end].to(self.embed_weight.dtype)
        soft = torch.matmul(local, self.embed_weight[: self.sc_vocab_end - self.sc_vocab_start])
        if self.tp_size > 1:
            soft = torch.ops.vllm.all_reduce(soft, group_name=self.tp_group_name)
        return soft * self.normalizer

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return async_tensor_h2d(array, device=self.diffusion_states.device)  # type: ignore[no-any-return]
