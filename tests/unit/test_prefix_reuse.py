"""Context that jobs have in common is computed once, and no token or float of any job can tell."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cluster.checkpoint import Checkpoint, read_checkpoint
from deployments.engine.api import EngineJob, Progress
from deployments.engine.torch_tp.cache import PAGE_TOKENS
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from tests.oracle import RandomShape, some_checkpoint, write_random_checkpoint

Steps = dict[tuple[str, int, int], Progress]
SYSTEM_TOKENS = 100
# Canvases that fill pages, that do not, and experts whose products see how many rows of a tile chose them.
DRAWN = {
    "pages cut by tiles": RandomShape(canvas=20),
    "tiles below a page": RandomShape(canvas=12, sliding_window=16),
    "many experts": RandomShape(canvas=20, experts=24, experts_per_token=3),
}


@pytest.fixture(scope="module", params=["trained", *DRAWN])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    if request.param != "trained":
        path = write_random_checkpoint(tmp_path_factory.mktemp("drawn"), DRAWN[request.param])
    return read_checkpoint(path)


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> TorchEngine:
    """An engine that reuses nothing, one job at a time: what every answer is compared with."""
    return engine(checkpoint, slots=1, prefix_reuse=False)


def engine(checkpoint: Checkpoint, **settings: int | bool) -> TorchEngine:
    return TorchEngine(checkpoint, EngineSettings(device="cpu", **settings))  # type: ignore[arg-type]  # by field


def tokens(checkpoint: Checkpoint, count: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(5, checkpoint.card.vocab_size) for _ in range(count))


def job(checkpoint: Checkpoint, name: str, prompt: Sequence[int], seed: int = 0, canvases: int = 2) -> EngineJob:
    sampling = replace(
        checkpoint.card.defaults,
        seed=seed,
        max_new_tokens=canvases * checkpoint.card.canvas_tokens,
        max_denoising_steps=3,
        confidence_threshold=1e-9,
    )
    return EngineJob(name, tuple(prompt), sampling, wants_drafts=True)


def steps_of(runner: TorchEngine, jobs: Sequence[EngineJob]) -> Steps:
    """Every step of every job: canvases and entropies, which differ when any bit of the context does."""
    for one in jobs:
        runner.start(one)
    return finish(runner)


def finish(runner: TorchEngine) -> Steps:
    steps = Steps()
    while runner.stats().active_jobs:
        for made in runner.step().progress:
            steps[made.job_id, made.canvas_index, made.step] = made
    return steps


def whole_tiles(checkpoint: Checkpoint, count: int) -> int:
    return count - count % checkpoint.card.canvas_tokens


def test_a_shared_prefix_is_computed_once_and_no_float_changes(checkpoint: Checkpoint, alone: TorchEngine) -> None:
    system = tokens(checkpoint, SYSTEM_TOKENS)
    jobs = [job(checkpoint, f"job-{n}", (*system, *tokens(checkpoint, 3 + n, n + 1)), n) for n in range(3)]
    runner = engine(checkpoint)
    for one in jobs:
        assert steps_of(runner, [one]) == steps_of(alone, [one])
    stats, shared = runner.stats(), whole_tiles(checkpoint, SYSTEM_TOKENS)
    assert stats.prefix_lookup_tokens == sum(len(one.prompt_tokens) for one in jobs)
    assert stats.prefix_hit_tokens == 2 * shared
    assert alone.stats().prefill_tokens - stats.prefill_tokens >= 2 * shared
    assert stats.pages_used == 0


def test_jobs_that_start_together_share_a_prefix_while_it_is_computed(
    checkpoint: Checkpoint, alone: TorchEngine
) -> None:
    system = tokens(checkpoint, SYSTEM_TOKENS)
    jobs = [job(checkpoint, f"job-{n}", (*system, *tokens(checkpoint, 30, n)), n) for n in range(4)]
    expected = {key: step for one in jobs for key, step in steps_of(alone, [one]).items()}
    for portion in (1, 3, 16):
        runner = engine(checkpoint, prefill_tiles_per_step=portion)
        assert steps_of(runner, jobs) == expected
        # A page that a tile fills in part is shared only from the next step on.
        if checkpoint.card.canvas_tokens % PAGE_TOKENS == 0:
            assert runner.stats().prefix_hit_tokens == 3 * whole_tiles(checkpoint, SYSTEM_TOKENS)


def test_the_same_prompt_with_other_seeds_shares_all_of_it(checkpoint: Checkpoint, alone: TorchEngine) -> None:
    prompt = tokens(checkpoint, SYSTEM_TOKENS - 1)
    jobs = [job(checkpoint, f"job-{seed}", prompt, seed) for seed in range(3)]
    runner = engine(checkpoint)
    for one in jobs:
        assert steps_of(runner, [one]) == steps_of(alone, [one])
    assert runner.stats().prefix_hit_tokens == 2 * len(prompt)


def long_answer(checkpoint: Checkpoint, alone: TorchEngine) -> tuple[EngineJob, Steps]:
    """A job of more than two canvases, and its steps."""
    for seed in range(20):
        one = job(checkpoint, "a", tokens(checkpoint, 45), seed, canvases=4)
        steps = steps_of(alone, [one])
        if any(canvas > 1 for _, canvas, _ in steps):
            return one, steps
    raise AssertionError("every answer ends early")


def test_a_job_that_comes_back_finds_its_own_context(checkpoint: Checkpoint, alone: TorchEngine) -> None:
    one, expected = long_answer(checkpoint, alone)
    committed: list[tuple[int, ...]] = []
    runner = engine(checkpoint)
    runner.start(one)
    while len(committed) < 2:
        committed += [commit.tokens for commit in runner.step().commits]
    first = runner.step()
    saved = runner.checkpoint("a")
    runner.stop("a")
    before = runner.stats()
    again = steps_of(runner, [replace(one, committed=tuple(committed), checkpoint=saved)])
    assert again == {key: step for key, step in expected.items() if key[1:] > (2, first.progress[0].step)}
    context = len(one.prompt_tokens) + 2 * checkpoint.card.canvas_tokens
    assert runner.stats().prefix_hit_tokens - before.prefix_hit_tokens == context


@pytest.mark.parametrize("place", [0, 40])
def test_a_prefix_that_differs_in_one_token_is_not_shared(checkpoint: Checkpoint, place: int) -> None:
    prompt = list(tokens(checkpoint, SYSTEM_TOKENS))
    runner = engine(checkpoint)
    steps_of(runner, [job(checkpoint, "a", prompt)])
    prompt[place] += 1 if prompt[place] == 5 else -1
    steps_of(runner, [job(checkpoint, "b", prompt)])
    assert runner.stats().prefix_hit_tokens == whole_tiles(checkpoint, place)


def test_equal_tokens_at_other_positions_are_not_shared(checkpoint: Checkpoint) -> None:
    prompt = (7,) * checkpoint.card.canvas_tokens
    runner = engine(checkpoint)
    steps_of(runner, [job(checkpoint, "a", (8, *prompt))])
    steps_of(runner, [job(checkpoint, "b", (*prompt, 8))])
    assert runner.stats().prefix_hit_tokens == 0


def test_without_reuse_nothing_is_looked_up(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, prefix_reuse=False)
    one = job(checkpoint, "a", tokens(checkpoint, SYSTEM_TOKENS), canvases=1)
    steps_of(runner, [one])
    steps_of(runner, [one])
    stats = runner.stats()
    assert (stats.prefix_lookup_tokens, stats.prefix_hit_tokens) == (0, 0)
    assert stats.prefill_tokens == 2 * SYSTEM_TOKENS


def test_jobs_that_come_and_go_in_a_small_cache_never_run_out_and_never_mix(
    checkpoint: Checkpoint, alone: TorchEngine
) -> None:
    rng = random.Random(11)
    small = engine(checkpoint, slots=3, max_context_tokens=max(5 * checkpoint.card.canvas_tokens, 112))
    room = small.card.max_context_tokens - 2 * checkpoint.card.canvas_tokens
    stems = [tokens(checkpoint, room, seed) for seed in range(3)]
    waiting = []
    for number in range(16):
        prompt = (*rng.choice(stems)[: rng.randrange(1, room)], rng.randrange(5, 90))
        waiting.append(job(checkpoint, f"job-{number}", prompt, number % 2))
    expected = {one.job_id: steps_of(alone, [one]) for one in waiting}
    seen: dict[str, Steps] = {one.job_id: {} for one in waiting}
    stopped: set[str] = set()
    while waiting or small.stats().active_jobs:
        while waiting and small.stats().active_jobs < small.slots:
            small.start(waiting.pop())
        report = small.step()
        for made in report.progress:
            seen[made.job_id][made.job_id, made.canvas_index, made.step] = made
        if rng.random() < 0.1 and report.progress:
            stopped.add(report.progress[0].job_id)
            small.stop(report.progress[0].job_id)
        assert small.stats().pages_used <= small.stats().pages_total
    assert small.stats().prefix_hit_tokens > 0
    assert small.stats().pages_used == 0
    for name, steps in expected.items():
        assert seen[name].items() <= steps.items()
        assert name in stopped or seen[name] == steps
