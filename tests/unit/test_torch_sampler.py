"""The sampler against transformers' own loop, fed the same random numbers; and its parts against plain sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.checkpoint import read_checkpoint
from cluster.core import SamplingParams
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.sampler import accepted_positions, inverse_cdf, temperature
from tests.oracle import (
    TRAINED,
    RandomShape,
    ReferenceRunner,
    ReferenceStep,
    checkpointed_tokens,
    encode,
    load_reference,
    reference_canvas,
    trained_checkpoint,
    write_random_checkpoint,
)

SAMPLING = SamplingParams(7, 96, 12, 0.3, 0.4, 0.8, 0.01, 1)
VARIANTS = {
    "as in the checkpoints": SAMPLING,
    "two stable steps": replace(SAMPLING, seed=2**63 + 11, stability_threshold=2, entropy_bound=0.05),
    "no stability, hot": replace(SAMPLING, seed=3, stability_threshold=0, t_min=0.9, t_max=1.6, entropy_bound=2.0),
    "one step": replace(SAMPLING, seed=4, max_denoising_steps=1),
}


@pytest.fixture(scope="module", params=[*TRAINED, "drawn"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    if request.param == "drawn":
        return write_random_checkpoint(tmp_path_factory.mktemp("drawn"), RandomShape())
    return trained_checkpoint(request.param)


def run_against(engine: TorchEngine, job: EngineJob, expected: list[list[ReferenceStep]]) -> int:
    """Steps the engine through `job` and compares every canvas of every step; returns the steps compared."""
    engine.start(job)
    compared = 0
    for index, canvas in enumerate(expected):
        for number, step in enumerate(canvas, start=1):
            report = engine.step()
            assert [(p.canvas_index, p.step) for p in report.progress] == [(index, number)]
            assert list(report.progress[0].draft_tokens) == step.argmax, (index, number)
            done = number == len(canvas)
            assert [list(commit.tokens) for commit in report.commits] == ([step.argmax] if done else [])
            if not done:
                assert checkpointed_tokens(engine, job.job_id) == step.canvas, (index, number)
            compared += 1
    engine.stop(job.job_id)
    return compared


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_gives_the_references_canvas(folder: Path, variant: str) -> None:
    checkpoint, reference = read_checkpoint(folder), load_reference(folder)
    engine = TorchEngine(checkpoint, EngineSettings(slots=1, device="cpu"))
    sampling = VARIANTS[variant]
    prompt = tuple(token % checkpoint.card.vocab_size for token in encode("count 31 to 38"))
    runner, context, expected = ReferenceRunner(reference), list(prompt), []
    for index in range(2):
        expected.append(reference_canvas(reference, runner, context, sampling, index))
        context = expected[-1][-1].argmax
        if not set(context).isdisjoint(checkpoint.card.eos_token_ids):
            break
    job = EngineJob("a", prompt, replace(sampling, max_new_tokens=2 * checkpoint.card.canvas_tokens), wants_drafts=True)
    assert run_against(engine, job, expected) == sum(map(len, expected))


@pytest.mark.parametrize("vocab_size", [7, 128, 512, 513, 3000])
def test_inverse_cdf_is_the_first_token_above_the_draw(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    probabilities = torch.softmax(3 * torch.randn(5, 40, vocab_size, generator=generator), dim=-1)
    uniforms = torch.rand(5, 40, generator=generator, dtype=torch.float64)
    cdf = probabilities.double().cumsum(dim=-1)
    expected = (cdf <= uniforms[..., None] * cdf[..., -1:]).sum(dim=-1)
    assert torch.equal(inverse_cdf(probabilities, uniforms), expected)


@pytest.mark.parametrize("vocab_size", [6, 3000])
def test_extreme_draws_stay_on_tokens_that_have_probability(vocab_size: int) -> None:
    probabilities = torch.zeros(1, 4, vocab_size)
    probabilities[..., 2], probabilities[..., 4] = 0.25, 0.75
    uniforms = torch.tensor([[0.0, np.nextafter(0.25, 0), 0.25, 1 - 2.0**-53]], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniforms).tolist() == [[2, 2, 4, 4]]


def test_acceptance_takes_the_surest_positions_up_to_the_bound() -> None:
    entropy = torch.tensor([[0.5, 0.1, 0.0, 0.3], [0.5, 0.1, 0.0, 0.3]])
    bounds = torch.tensor([[0.1], [0.0]])
    accepted: Tensor = accepted_positions(entropy, bounds)
    # Row 0: before 0.3 lie 0.0 + 0.1 <= 0.1, before 0.5 lie 0.4. Row 1: nothing may lie before.
    assert accepted.tolist() == [[False, True, True, True], [False, True, True, False]]


def test_the_temperature_schedule_is_stretched_over_the_jobs_own_steps() -> None:
    short, long = replace(SAMPLING, max_denoising_steps=4), replace(SAMPLING, max_denoising_steps=48)
    assert [round(temperature(short, step), 6) for step in (1, 2, 3, 4)] == [0.8, 0.7, 0.6, 0.5]
    assert temperature(long, 1) == temperature(short, 1)
    assert round(temperature(long, 48), 6) == round(0.4 + 0.4 / 48, 6)
