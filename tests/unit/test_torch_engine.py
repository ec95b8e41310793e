"""The torch engine's own promises: batch invariance of its parts, prefill in portions, settings, dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.checkpoint import Checkpoint, read_checkpoint
from cluster.errors import ConfigError
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp import weights
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.experts import route
from deployments.engine.torch_tp.linear import TileLinear, tile_product
from deployments.engine.torch_tp.plan import context_bucket
from tests.oracle import RandomShape, TileRunner, encode, write_random_checkpoint


def engine(checkpoint: Checkpoint, **settings: int | str) -> TorchEngine:
    return TorchEngine(checkpoint, EngineSettings(device="cpu", **settings))  # type: ignore[arg-type]  # by field


def answer(runner: TorchEngine, job: EngineJob) -> list[tuple[int, ...]]:
    runner.start(job)
    canvases = []
    while runner.stats().active_jobs:
        canvases += [commit.tokens for commit in runner.step().commits]
    return canvases


def job(checkpoint: Checkpoint, prompt: str, **sampling: float) -> EngineJob:
    resolved = replace(checkpoint.card.defaults, **sampling)  # type: ignore[arg-type]  # by field
    return EngineJob("a", encode(prompt), resolved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 772), (256, 128), (48, 5), (704, 640), (2816, 96)])
@pytest.mark.parametrize("make", [TileLinear, tile_product])
def test_a_tiles_product_does_not_depend_on_other_tiles(
    make: type[TileLinear], inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(12, 32, inputs, generator=generator).to(dtype)
    product = make(weight)
    with torch.inference_mode():
        single = [product(tile[None]) for tile in x]
        assert all(torch.equal(product(x[:count]), torch.cat(single[:count])) for count in (2, 3, 5, 8, 12))
        assert torch.allclose(product(x).float(), functional.linear(x, weight).float(), rtol=2e-2, atol=2e-2)


def test_routing_is_the_renormalised_top_of_the_softmax() -> None:
    scores = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    weights_of, chosen = route(scores, 3)
    top, expected = torch.topk(torch.softmax(scores, dim=-1), 3)
    assert torch.equal(chosen, expected)
    assert torch.allclose(weights_of, top / top.sum(dim=-1, keepdim=True))


def test_both_expert_paths_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = read_checkpoint(write_random_checkpoint(tmp_path, RandomShape()))
    canvas = np.arange(5, 5 + drawn.card.canvas_tokens)
    dense: Tensor = TileRunner(drawn).logits(range(5, 60), canvas)
    monkeypatch.setattr(weights, "MAX_DENSE_EXPERTS", 1)
    routed = TileRunner(drawn).logits(range(5, 60), canvas)
    assert float((dense - routed).abs().max()) < 1e-5


def test_context_buckets_grow_with_the_context_and_always_hold_it() -> None:
    buckets = [context_bucket(tokens) for tokens in range(5000)]
    assert all(bucket >= tokens for tokens, bucket in enumerate(buckets))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) < 30
    assert buckets[0] == buckets[32] == 32
    assert (buckets[33], buckets[257], buckets[1025]) == (64, 320, 1280)


def test_long_prompts_join_in_portions_and_running_canvases_go_on(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, slots=2, prefill_tiles_per_step=2)
    runner.start(replace(job(checkpoint, "sort 1", confidence_threshold=1e-9), job_id="running"))
    runner.step()
    prompt = "x" * (5 * checkpoint.card.canvas_tokens)
    runner.start(replace(job(checkpoint, prompt), job_id="long"))
    seen = [[progress.job_id for progress in runner.step().progress] for _ in range(3)]
    # 6 tiles in portions of 2: the third step holds the last two and the first denoising step.
    assert [("long" in ids) for ids in seen] == [False, False, True]
    assert all("running" in ids for ids in seen)


@pytest.mark.parametrize("portion", [1, 2, 16])
def test_the_portion_of_prefill_does_not_change_the_answer(checkpoint: Checkpoint, portion: int) -> None:
    long = job(checkpoint, "upper " + "amber tile " * 12, seed=3, max_denoising_steps=5)
    assert answer(engine(checkpoint, prefill_tiles_per_step=portion), long) == answer(engine(checkpoint), long)


def test_bfloat16_runs_answers_and_resumes(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, dtype="bfloat16")
    short = job(checkpoint, "count 31 to 38", confidence_threshold=1e-9, max_denoising_steps=5)
    expected = answer(runner, short)
    runner.start(short)
    runner.step()
    saved = runner.checkpoint("a")
    assert answer(engine(checkpoint, dtype="bfloat16"), replace(short, checkpoint=saved)) == expected
    with pytest.raises(ValueError, match="bfloat16"):
        engine(checkpoint).start(replace(short, checkpoint=saved))


def test_a_smaller_context_limit_shrinks_the_cache_and_is_enforced(checkpoint: Checkpoint) -> None:
    small, whole = engine(checkpoint, max_context_tokens=128), engine(checkpoint)
    assert small.card.max_context_tokens == 128
    assert small.stats().pages_total < whole.stats().pages_total
    fits = job(checkpoint, "x" * 61, max_new_tokens=64)
    assert len(fits.prompt_tokens) == 64
    assert answer(small, fits) == answer(whole, fits)
    with pytest.raises(ValueError, match="128"):
        small.start(job(checkpoint, "x" * 62, max_new_tokens=64))


def test_a_whole_context_can_be_used_to_its_last_position(checkpoint: Checkpoint) -> None:
    card = checkpoint.card
    room = card.max_context_tokens - 2 * card.canvas_tokens
    full = replace(
        job(checkpoint, "", max_new_tokens=2 * card.canvas_tokens, max_denoising_steps=2),
        prompt_tokens=(40,) * room,
    )
    assert len(answer(engine(checkpoint), full)) <= 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float16"),
        ("device", "tpu"),
        ("slots", 0),
        ("prefill_tiles_per_step", 0),
        ("max_context_tokens", 32),
        ("max_context_tokens", 10**9),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(checkpoint: Checkpoint, name: str, value: int | str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is {value!r}; it must [^\n]*$"):
        TorchEngine(checkpoint, EngineSettings(**({"device": "cpu"} | {name: value})))  # type: ignore[arg-type]  # bad


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        EngineSettings(device="cuda")
