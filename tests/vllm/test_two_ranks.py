"""vLLM on two tensor-parallel ranks, as processes on this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments.engine.torch_tp.engine import load_engine as load_torch
from deployments.engine.vllm_engine import VllmEngine, load_engine
from tests.contract.engines import drive
from tests.oracle import some_checkpoint
from tests.vllm.driving import run_all, tokens_of, varied_jobs


@pytest.fixture(scope="module")
def pair() -> Iterator[VllmEngine]:
    path = some_checkpoint()
    assert path is not None
    engine = load_engine(path, slots=8, tp=2, executor="mp", enforce_eager=True)
    yield engine
    engine.close()


def test_two_ranks_give_the_tokens_of_the_torch_engine(pair: VllmEngine) -> None:
    path = some_checkpoint()
    assert path is not None
    jobs = varied_jobs(pair.card, 16)
    assert pair.stats().ranks == 2
    assert tokens_of(run_all(pair, jobs)[1]) == tokens_of(run_all(load_torch(path, slots=8, device="cpu"), jobs)[1])


def test_a_checkpoint_of_two_ranks_continues(pair: VllmEngine) -> None:
    job = varied_jobs(pair.card, 5)[4]
    (expected,) = tokens_of(run_all(pair, [job])[1]).values()
    pair.start(job)
    assert not drive(pair, steps=3).commits
    saved = pair.checkpoint(job.job_id)
    assert saved is not None
    pair.stop(job.job_id)
    pair.start(replace(job, checkpoint=saved))
    run = drive(pair)
    assert run.steps(job.job_id)[0] == (0, saved.step + 1)
    assert run.canvases(job.job_id) == [expected]
