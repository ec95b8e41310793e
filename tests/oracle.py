"""What tests compare the torch engine with: transformers' own DiffusionGemma, and small checkpoints to run it on."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.core import SamplingParams
from deployments.engine.admission import DIGEST_BYTES
from deployments.engine.randomness import initial_canvas, step_draws
from deployments.engine.torch_tp.cache import TRASH_ROW, KVCache, pages_for, rows_of
from deployments.engine.torch_tp.engine import TorchEngine
from deployments.engine.torch_tp.group import Group, Solo
from deployments.engine.torch_tp.model import Model
from deployments.engine.torch_tp.plan import Planner, Tile
from deployments.engine.torch_tp.shard import Shard
from deployments.engine.torch_tp.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "checkpoints"
TRAINED = ("models/tiny", "checkpoints/tiny", "checkpoints/tiny-undertrained")
CHECKPOINTS = (ROOT / "models" / "tiny", SHARED / "tiny-undertrained", SHARED / "tiny")
IntArray = NDArray[np.int64]


def some_checkpoint() -> Path | None:
    """A trained checkpoint that is there, or None."""
    return next((path for path in CHECKPOINTS if (path / "config.json").is_file()), None)


def trained_checkpoint(name: str) -> Path:
    """A trained checkpoint by its folder's name and parent, or a skip where this machine has none."""
    path = next(path for path in CHECKPOINTS if path.as_posix().endswith(name))
    if not (path / "config.json").is_file():
        pytest.skip(f"{name} is not here")
    return path


def encode(text: str) -> tuple[int, ...]:
    """A prompt of the tiny checkpoints: bos, turn, one token per character, end of turn."""
    return (2, 3, *(ord(character) for character in text), 4)


def load_reference(path: Path) -> Any:  # noqa: ANN401 - transformers has no usable types
    """transformers' model in float32, ready to run."""
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32)
    return model.eval()


@dataclass(frozen=True)
class RandomShape:
    """The numbers that a random checkpoint varies."""

    experts: int = 8
    experts_per_token: int = 2
    sliding_window: int = 24
    canvas: int = 16
    older_keys: bool = False


def write_random_checkpoint(folder: Path, shape: RandomShape, seed: int = 0) -> Path:
    """Saves a freshly drawn model: grouped heads, two layer types, other kv heads on full-attention layers."""
    from transformers import DiffusionGemmaConfig
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference

    full = {"head_dim": 32, "num_key_value_heads": 1}
    older = {"global_head_dim": 32, "num_global_key_value_heads": 1}
    text = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": shape.sliding_window,
        "max_position_embeddings": 256,
        "num_experts": shape.experts,
        "top_k_experts": shape.experts_per_token,
        **(older if shape.older_keys else {"per_layer_config": {1: full, 3: full}}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DiffusionGemmaConfig(text_config=text, vision_config=_vision(), canvas_length=shape.canvas)
        model = reference.DiffusionGemmaForBlockDiffusion(config)
        _draw(model, seed)
        _generation(model)
        model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _vision() -> dict[str, Any]:
    source = some_checkpoint()
    if source is None:
        pytest.skip("no checkpoint is here to take the vision part of the configuration from")
    vision: dict[str, Any] = json.loads((source / "config.json").read_text())["vision_config"]
    return vision


def _draw(model: Any, seed: int) -> None:  # noqa: ANN401
    """Weights with some life in them: the library's own start makes every layer close to the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                # Query and key norms as large as 1 would make attention so sharp that rounding decides.
                level = parameter.shape[0] ** -0.25 if "q_norm" in name or "k_norm" in name else 1.0
                parameter.copy_(level * (1.0 + 0.2 * noise))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for index, layer in enumerate(model.model.decoder.layers):
            layer.layer_scalar.fill_(0.7 + 0.1 * index)
            model.model.encoder.language_model.layers[index].layer_scalar.fill_(0.7 + 0.1 * index)


def _generation(model: Any) -> None:  # noqa: ANN401
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    defaults: dict[str, Any] = {
        "max_new_tokens": 48,
        "max_denoising_steps": 12,
        "sampler_config": EntropyBoundSamplerConfig(entropy_bound=0.5),
        "t_min": 0.4,
        "t_max": 0.8,
        "stability_threshold": 1,
        "confidence_threshold": 0.05,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A writable copy of a checkpoint folder."""
    shutil.copytree(source, target)
    for path in (target, *target.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


class TileRunner:
    """The lean model driven by hand: encode some tokens, then look at the logits of a canvas after them.

    With a `group`, every rank drives its own in the same way, and has the logits of its part of the vocabulary.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, group: Group | None = None) -> None:
        group = group or Solo()
        shard, device = Shard(group.rank, group.world), torch.device("cpu")
        config = shard.config(checkpoint.config)
        self._size = config.canvas_tokens
        reach = config.max_position_tokens
        self.model = Model(config, load_weights(checkpoint, dtype, device, shard), reach, group)
        self._hidden, self._dtype = config.hidden_size, dtype
        self._cache = KVCache(config.layers, 1, config.canvas_tokens, reach, dtype, device)
        self._planner = Planner(config, reach, dtype, device)
        self._rows = rows_of(self._cache.allocator.take(pages_for(reach)))
        self.position = 0

    def encode_tiles(self, tokens: Sequence[int]) -> list[Tile]:
        """The tiles that make `tokens` context, after what is context already."""
        tiles = []
        for first in range(0, len(tokens), self._size):
            part = np.array(tokens[first : first + self._size], dtype=np.int64)
            valid, missing = len(part), self._size - len(part)
            rows = self._rows[self.position : self.position + valid]
            written = np.pad(rows, (0, missing), constant_values=TRASH_ROW)
            tiles.append(Tile(np.pad(part, (0, missing)), self.position, valid, self._rows, written))
            self.position += valid
        return tiles

    def logits(self, context: Sequence[int], canvas: IntArray, soft: Tensor | None = None) -> Tensor:
        """Encodes `context` and, in the same forward, denoises `canvas` after it; float32 [rows, vocab]."""
        tiles = self.encode_tiles(context)
        own = self._cache.canvas_rows[0]
        tiles.append(Tile(canvas, self.position, self._size, self._rows, own, slot=0))
        if soft is None:
            soft = torch.zeros(1, self._size, self._hidden, dtype=self._dtype)
        with torch.inference_mode():
            hidden = self.model.forward(self._planner.build(tiles), soft, self._cache.layers)
            return self.model.logits(hidden)[0]

    def soft_embedding(self, scores: Tensor) -> Tensor:
        """Self-conditioning from logits [rows, vocab]."""
        with torch.inference_mode():
            return self.model.soft_embedding(scores[None], torch.softmax(scores[None], dim=-1))


class ReferenceRunner:
    """transformers driven the same way: its encoder fills a dynamic cache, its decoder reads it."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        from transformers import DynamicCache

        self._model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))

    def logits(self, context: Sequence[int], canvas: IntArray, scores: Tensor | None = None) -> Tensor:
        """As `TileRunner.logits`; `scores` [rows, vocab] are the self-conditioning logits."""
        with torch.no_grad():
            if context:
                self._model.model.encoder(input_ids=torch.tensor([context]), past_key_values=self.cache)
            output = self._model(
                decoder_input_ids=torch.from_numpy(canvas)[None],
                past_key_values=self.cache,
                self_conditioning_logits=None if scores is None else scores[None],
            )
        return output.logits[0]  # type: ignore[no-any-return]  # transformers has no usable types


@dataclass(frozen=True)
class ReferenceStep:
    """One denoising step of the reference: the next canvas, the argmax canvas, and whether it stops there."""

    canvas: list[int]
    argmax: list[int]
    finished: bool


def reference_canvas(
    model: Any,  # noqa: ANN401
    runner: ReferenceRunner,
    context: Sequence[int],
    sampling: SamplingParams,
    index: int,
) -> list[ReferenceStep]:
    """transformers' own denoising loop on canvas `index`, fed Easel's random numbers."""
    from transformers.generation.logits_process import LogitsProcessorList
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    size, vocab = model.config.canvas_length, model.config.text_config.vocab_size
    with torch.no_grad():
        model.model.encoder(input_ids=torch.tensor([context]), past_key_values=runner.cache)
    bound = generation.EntropyBoundSamplerConfig(entropy_bound=sampling.entropy_bound)
    sampler = generation.EntropyBoundSampler(bound, size, vocab, sampling.max_denoising_steps)
    schedule = generation.LinearTemperatureScheduleLogitsProcessor(
        sampling.t_min, sampling.t_max, sampling.max_denoising_steps
    )
    criteria = generation.StableAndConfidentStoppingCriteria(
        sampling.stability_threshold, sampling.confidence_threshold
    )
    canvas = torch.from_numpy(initial_canvas(sampling.seed, index, size, vocab))[None]
    argmax, scores, finished = canvas, None, torch.zeros(1, dtype=torch.bool)
    steps = []
    for step in range(1, sampling.max_denoising_steps + 1):
        uniforms, replacements = step_draws(sampling.seed, index, step, size, vocab)
        with _injected(sampler, uniforms, replacements), torch.no_grad():
            canvas, argmax, scores, finished = model._denoising_step(
                decoder_forward=model.forward,
                current_canvas=canvas,
                argmax_canvas=argmax,
                input_ids=None,
                decoder_position_ids=None,
                self_conditioning_logits=scores,
                mask_mapping=None,
                past_key_values=runner.cache,
                finished_denoising=finished,
                cur_step=sampling.max_denoising_steps + 1 - step,
                sampler=sampler,
                logits_processor=LogitsProcessorList([schedule]),
                diffusion_stopping_criteria=criteria,
            )
        steps.append(ReferenceStep(canvas[0].tolist(), argmax[0].tolist(), bool(finished)))
        if finished:
            break
    return steps


@contextmanager
def _injected(sampler: Any, uniforms: NDArray[np.float64], replacements: IntArray) -> Iterator[None]:  # noqa: ANN401
    """Replaces the two places where the reference draws: multinomial, and the canvas it noises with."""

    def by_inverse_cdf(probabilities: Tensor, num_samples: int) -> Tensor:
        assert num_samples == 1
        cdf = probabilities.double().cumsum(dim=-1)
        target = torch.from_numpy(uniforms)[:, None] * cdf[:, -1:]
        return (cdf <= target).sum(dim=-1, keepdim=True)

    noise = torch.from_numpy(replacements)[None]
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch, "multinomial", by_inverse_cdf),
        mock.patch.object(sampler, "initialize_canvas", return_value=noise),
    ):
        # The reference calls torch.compiler, whose import uses what torch itself has deprecated.
        warnings.simplefilter("ignore")
        yield


def checkpointed_tokens(engine: TorchEngine, job_id: str) -> list[int]:
    """The noisy canvas of a job in progress, as its checkpoint holds it."""
    saved = engine.checkpoint(job_id)
    assert saved is not None
    with np.load(io.BytesIO(saved.payload[DIGEST_BYTES:])) as arrays:
        return [int(token) for token in arrays["tokens"]]
