"""Easel inside vLLM's worker: the one file that touches what vLLM does not promise to keep (docs/adr/0018 lists it).

vLLM's model and its attention stay as they are. What changes is what happens around a forward: a request's random
numbers are its own (randomness.py), every step is reported, a forward waits until the engine asks for it, and a canvas
in progress can be taken out and put back. Every rank runs all of this on the same numbers; rank 0 talks to the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from deployments.engine.randomness import step_draws
from deployments.engine.torch_tp.payload import CanvasState
from deployments.engine.torch_tp.sampler import accepted_positions, inverse_cdf, temperature
from deployments.engine.vllm_requests import Outcome, Phase, Reporter, Request
from deployments.engine.vllm_wire import EXTRA, Address, StepEvent, WorkerEnd

# What the working copies of a tile's scores may take of the free memory of a GPU, and how many there are at once.
TILE_MEMORY_SHARE = 0.5
TILE_COPIES = 3


class EaselDiffusionGemma(DiffusionGemmaForConditionalGeneration):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's model; where Easel drives it, with Easel's state and sampler."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: ANN401
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._driven = isinstance(vllm_config.additional_config, Address)
        self._vocab_size = vllm_config.model_config.get_vocab_size()

    def get_model_state_cls(self) -> type[Any]:
        return EaselState if self._driven else DiffusionGemmaModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Scores [rows, vocab]. A forward over prompts alone has no rows, and ranks have nothing to gather: vLLM's
        shared memory for ranks on a CPU divides by their number."""
        if not len(hidden_states):
            return hidden_states.new_empty((0, self._vocab_size))
        return super().compute_logits(hidden_states)  # type: ignore[no-any-return]


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

    def _apply_self_conditioning(
        self,
        decode_slots_np: NDArray[Any],
        decode_idx_np: NDArray[Any],
        query_start_loc_np: NDArray[Any],
        inputs_embeds: Tensor,
        sc_embeds: Tensor,
    ) -> None:
        """Leaves the rows of a canvas that is committed as they are: context has no self-conditioning, and not its
        norm either. vLLM applies that norm to them, which makes what it commits differ from what it prefills."""
        plain = inputs_embeds.clone()
        super()._apply_self_conditioning(decode_slots_np, decode_idx_np, query_start_loc_np, inputs_embeds, sc_embeds)
        for slot, row in zip(decode_slots_np.tolist(), decode_idx_np.tolist(), strict=True):
            span = slice(int(query_start_loc_np[row]), int(query_start_loc_np[row + 1]))
            commits = self.diffusion_states.is_encoder_phase[slot]
            inputs_embeds[span] = torch.where(commits, plain[span], inputs_embeds[span])

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
            step_draws(r.sampling.seed, r.canvas_index, r.step + 1, self.canvas_length, self.vocab_size)
            for r in requests
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
        return soft * self.normalizer  # type: ignore[no-any-return]

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return async_tensor_h2d(array, device=self.diffusion_states.device)  # type: ignore[no-any-return]
