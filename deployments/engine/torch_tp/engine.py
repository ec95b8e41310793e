"""The torch engine: continuous batching of jobs in any phase, one forward per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import Checkpoint, check_degree, read_checkpoint
from cluster.core import ModelCard
from cluster.errors import ConfigError
from deployments.engine.admission import check_job, open_checkpoint
from deployments.engine.api import (
    CanvasCheckpoint,
    Commit,
    EngineJob,
    EngineStats,
    StepReport,
)
from deployments.engine.torch_tp.cache import JobPages, KVCache
from deployments.engine.torch_tp.decision import decision
from deployments.engine.torch_tp.group import Group, Solo
from deployments.engine.torch_tp.job import ActiveJob
from deployments.engine.torch_tp.model import Model
from deployments.engine.torch_tp.payload import CanvasState, pack, unpack
from deployments.engine.torch_tp.plan import Planner, Tile
from deployments.engine.torch_tp.prefill import PrefillQueue
from deployments.engine.torch_tp.sampler import StepInputs, temperature
from deployments.engine.torch_tp.shard import Shard
from deployments.engine.torch_tp.step_graph import CudaRecorder, Outputs, Recorder, StepGraphs, StepWork
from deployments.engine.torch_tp.weights import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How one replica runs a checkpoint.

    `max_context_tokens` bounds prompt and answer of one job and, with `slots`, the size of the KV cache; None takes
    what the model was made for. `prefill_tiles_per_step` bounds how much of the waiting prompts joins one step, so
    that a long prompt holds up the canvases in progress by no more than that. `prefix_reuse` shares what jobs have in
    common at the start of their contexts; it changes no token. `cuda_graphs` replays denoising steps on CUDA, where
    the replica is one rank. Raises ConfigError.
    """

    slots: int = 8
    dtype: str = "float32"
    device: str = "auto"
    max_context_tokens: int | None = None
    prefill_tiles_per_step: int = 4
    prefix_reuse: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but torch finds no GPU here; set it to cpu or auto")
        for name in ("slots", "prefill_tiles_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def torch_device(self) -> torch.device:
        """Where it runs: `auto` takes the GPU if there is one."""
        wants_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if wants_gpu else "cpu")


def load_engine(folder: str | Path, *, threads: int = 1, **settings: Any) -> TorchEngine:  # noqa: ANN401
    """Reads a checkpoint folder into an engine; `settings` are the fields of EngineSettings.

    `threads` are the CPU threads of this process's matrix products. Raises CheckpointError or ConfigError.
    """
    torch.set_num_threads(threads)
    return TorchEngine(read_checkpoint(folder), EngineSettings(**settings))


class TorchEngine:
    """Implements `deployments.engine.api.Engine` for one rank, on CPU or CUDA.

    The host owns all tokens; the device owns keys, values and self-conditioning embeddings. One step uploads index
    arrays and draws, and downloads two small arrays.

    With a `group` of several ranks, every rank has such an engine and makes the same calls in the same order. All that
    the host decides comes out equal on them, so they stay alike without telling each other (see `decision`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: EngineSettings | None = None,
        group: Group | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`recorder` stands in for CUDA graphs. Raises ConfigError for a degree that the model cannot be cut to."""
        self._settings = settings = settings or EngineSettings()
        self._group = group = group or Solo()
        check_degree(checkpoint.config, group.world)
        shard = Shard(group.rank, group.world)
        config, device, dtype = shard.config(checkpoint.config), settings.torch_device, DTYPES[settings.dtype]
        self._device, self._hidden_size = device, config.hidden_size
        context_tokens = _context_tokens(checkpoint, settings)
        self._card = replace(checkpoint.card, max_context_tokens=context_tokens)
        self._eos = np.array(checkpoint.card.eos_token_ids)
        with torch.inference_mode():
            weights = load_weights(checkpoint, dtype, device, shard)
            self._model = Model(config, weights, context_tokens, group)
            self._decide = decision(self._model, group)
            self._cache = KVCache(
                config.layers,
                settings.slots,
                config.canvas_tokens,
                context_tokens,
                dtype,
                device,
                settings.prefix_reuse,
            )
            # One row more than slots: it stays zero, and a canvas's first step reads it.
            shape = (settings.slots + 1, config.canvas_tokens, config.hidden_size)
            self._soft = torch.zeros(shape, dtype=dtype, device=device)
        self._planner = Planner(config, context_tokens, dtype, device)
        self._graphs = self._step_graphs(recorder)
        self._free_slots = list(range(settings.slots - 1, -1, -1))
        self._jobs: dict[str, ActiveJob] = {}
        self._prefill = PrefillQueue(settings.prefill_tiles_per_step)
        self._denoising_steps = self._canvas_steps = self._canvases = self._prefill_tokens = 0

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def slots(self) -> int:
        return self._settings.slots

    def start(self, job: EngineJob) -> None:
        """See `Engine.start`. Reserves every page that the job can need, so a running job never runs out."""
        if job.job_id in self._jobs:
            raise KeyError(f"job {job.job_id} is active already")
        check_job(self._card, job)
        state = self._read_checkpoint(job)
        if not self._free_slots:
            raise RuntimeError(f"all {self.slots} slots are taken")
        canvases = self._card.canvases_for(job.sampling.max_new_tokens)
        # The last canvas is never context, so it needs no pages.
        reach_tokens = len(job.prompt_tokens) + (canvases - 1) * self._card.canvas_tokens
        slot = self._free_slots.pop()
        active = ActiveJob(
            spec=job,
            slot=slot,
            canvases=canvases,
            pages=JobPages(self._cache, reach_tokens),
            canvas_rows=self._cache.canvas_rows[slot],
            vocab_size=self._card.vocab_size,
        )
        active.begin(state)
        if state is not None:
            with torch.inference_mode():
                self._soft[slot] = torch.from_numpy(state.soft)
        self._jobs[job.job_id] = active
        self._prefill.add(active)

    def step(self) -> StepReport:
        """See `Engine.step`."""
        tiles, ready = self._schedule()
        if not tiles:
            return StepReport()
        with torch.inference_mode():
            tokens, numbers = self._run(tiles, ready)
        self._cache.index.settle()
        self._denoising_steps += 1
        self._canvas_steps += len(ready)
        self._prefill_tokens += sum(tile.valid for tile in tiles if not tile.denoises)
        place = {job.slot: index for index, job in enumerate(ready)}
        progress, commits = [], []
        for job in [job for job in self._jobs.values() if job.slot in place]:
            index = place[job.slot]
            mean_entropy, accepted = float(numbers[0, index]), int(numbers[1, index])
            job.advance(tokens[0, index], tokens[1, index])
            progress.append(job.progress(mean_entropy, accepted))
            if job.converged(mean_entropy):
                commits.append(self._commit(job, mean_entropy))
        return StepReport(tuple(progress), tuple(commits))

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            job.pages.release()
            self._prefill.remove(job)
            self._free_slots.append(job.slot)

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """See `Engine.checkpoint`."""
        job = self._jobs[job_id]
        if job.step == 0:
            return None
        state = CanvasState(
            tokens=job.tokens,
            argmax=job.argmax,
            soft=self._soft[job.slot].float().cpu().numpy(),
            step=job.step,
            unchanged_steps=job.unchanged_steps,
            dtype=self._settings.dtype,
        )
        return CanvasCheckpoint(self._card.version, job.canvas_index, job.step, pack(state))

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        allocator, index = self._cache.allocator, self._cache.index
        return EngineStats(
            denoising_steps=self._denoising_steps,
            canvas_steps=self._canvas_steps,
            canvases=self._canvases,
            prefill_tokens=self._prefill_tokens,
            active_jobs=len(self._jobs),
            pages_used=allocator.used,
            pages_total=allocator.total,
            prefix_lookup_tokens=index.lookup_tokens,
            prefix_hit_tokens=index.hit_tokens,
            ranks=self._group.world,
        )

    def lost(self) -> str | None:
        """See `Engine.lost`. One rank cannot tell."""
        return None

    def close(self) -> None:
        """See `Engine.close`."""
        for job_id in list(self._jobs):
            self.stop(job_id)
        self._group.close()

    def _read_checkpoint(self, job: EngineJob) -> CanvasState | None:
        if job.checkpoint is None:
            return None
        body = open_checkpoint(self._card, job, job.checkpoint)
        return unpack(body, self._card.canvas_tokens, self._hidden_size, self._settings.dtype)

    def _schedule(self) -> tuple[list[Tile], list[ActiveJob]]:
        """This step's tiles, shortest context first, and the jobs that denoise, in the order of their tiles.

        A commit's tile always runs, because its job waits for nothing else; prompts share a budget of tiles.
        """
        commits = [job.next_tile() for job in self._jobs.values() if job.prefilled and job.waiting]
        chosen: list[tuple[Tile, ActiveJob | None]] = [(tile, None) for tile in commits + self._prefill.choose()]
        for job in self._jobs.values():
            if not job.waiting:
                job.prefilled = True
                chosen.append((job.denoise_tile(), job))
        chosen.sort(key=lambda pair: pair[0].start)
        return [tile for tile, _ in chosen], [job for _, job in chosen if job is not None]

    def _run(self, tiles: Sequence[Tile], ready: Sequence[ActiveJob]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """One forward and one decision. Returns argmax and next canvas, int64 [2, jobs, rows], and mean entropy and
        accepted count, float64 [2, jobs], jobs as in `ready`."""
        try:
            return self._compute(tiles, ready)
        except torch.OutOfMemoryError as error:
            # Recordings hold memory of their own.
            if self._graphs is None or not self._graphs.give_up(error):
                raise
        return self._compute(tiles, ready)

    def _compute(
        self, tiles: Sequence[Tile], ready: Sequence[ActiveJob]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        plan = self._planner.build(tiles)
        # The last row is the zero one.
        before = self._upload(np.array([job.slot if job.step else self.slots for job in ready], dtype=np.int64))
        if not ready:
            self._model.forward(plan, self._soft.index_select(0, before), self._cache.layers)
            return np.empty((2, 0, 0), dtype=np.int64), np.empty((2, 0))
        after = self._upload(np.array([job.slot for job in ready]))
        run = self._denoise if self._graphs is None else self._graphs
        tokens, numbers = run(StepWork(plan, before, after, self._inputs(ready)))
        return tokens.cpu().numpy(), numbers.cpu().numpy()

    def _denoise(self, work: StepWork) -> Outputs:
        """On the device alone: nothing here may wait for it, or it could not be recorded."""
        hidden = self._model.forward(work.plan, self._soft.index_select(0, work.before), self._cache.layers)
        outputs = self._decide(hidden, work.inputs)
        tokens = torch.stack((outputs.argmax, outputs.next_canvas))
        numbers = torch.stack((outputs.mean_entropy.double(), outputs.accepted.double()))
        # Last: a step that runs out of memory before may be done again.
        self._soft.index_copy_(0, work.after, outputs.soft)
        return tokens, numbers

    def _step_graphs(self, recorder: Recorder | None) -> StepGraphs | None:
        """None where steps are not recorded: on CPU, when it is turned off, and with several ranks, whose waits for
        each other have a timeout only outside of a graph."""
        settings = self._settings
        if not settings.cuda_graphs or self._group.world > 1:
            return None
        if recorder is None and self._device.type != "cuda":
            return None
        # A graph keeps addresses, so memory that grows must have its last size before: at most every slot has a
        # committed canvas and a new one in a step, next to the prompts.
        self._model.reserve(2 * settings.slots + settings.prefill_tiles_per_step)
        return StepGraphs(self._denoise, recorder or CudaRecorder())

    def _inputs(self, ready: Sequence[ActiveJob]) -> StepInputs:
        draws = [job.draws() for job in ready]
        heats = [temperature(job.spec.sampling, job.step + 1) for job in ready]
        bounds = [job.spec.sampling.entropy_bound for job in ready]
        return StepInputs(
            temperatures=self._upload(np.array(heats, dtype=np.float32)[:, None, None]),
            entropy_bounds=self._upload(np.array(bounds, dtype=np.float32)[:, None]),
            uniforms=self._upload(np.stack([uniforms for uniforms, _ in draws])),
            replacements=self._upload(np.stack([tokens for _, tokens in draws])),
        )

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _commit(self, job: ActiveJob, mean_entropy: float) -> Commit:
        last = job.canvas_index + 1 >= job.canvases or bool(np.isin(job.argmax, self._eos).any())
        commit = Commit(
            job_id=job.spec.job_id,
            canvas_index=job.canvas_index,
            tokens=tuple(job.argmax.tolist()),
            denoising_steps=job.step,
            mean_entropy=mean_entropy,
            last=last,
        )
        self._canvases += 1
        if last:
            self.stop(job.spec.job_id)
        else:
            job.commit()
        return commit


def _context_tokens(checkpoint: Checkpoint, settings: EngineSettings) -> int:
    limit = checkpoint.card.max_context_tokens
    wanted = settings.max_context_tokens or limit
    if not checkpoint.card.canvas_tokens < wanted <= limit:
        raise ConfigError(
            f"max_context_tokens is {wanted}; it must be above one canvas of {checkpoint.card.canvas_tokens} and "
            f"at most the model's {limit}"
        )
    return wanted
