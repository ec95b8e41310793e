"""Tensor parallelism: the same tokens at every degree, what it sends, and what happens when a rank dies or hangs."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.engine import mixed_prompts
from cluster import __version__
from cluster.checkpoint import LayerConfig, check_degree, read_checkpoint
from cluster.core import ModelCard
from cluster.errors import ConfigError, EngineError
from deployments.engine.api import Engine, EngineJob
from deployments.engine.torch_tp import ranks, weights
from deployments.engine.torch_tp.engine import load_engine
from deployments.engine.torch_tp.group import Ranks
from deployments.engine.torch_tp.lead import LeadEngine
from deployments.engine.torch_tp.link import join_lead
from deployments.engine.torch_tp.ranks import Meeting, lead_rank
from deployments.engine.torch_tp.shard import Shard
from deployments.engine.torch_tp.traffic import step_bytes
from deployments.engine.torch_tp.weights import load_weights
from tests.oracle import (
    TRAINED,
    RandomShape,
    ReferenceRunner,
    TileRunner,
    load_reference,
    trained_checkpoint,
    write_random_checkpoint,
)
from tests.ranks import HOST, WAIT_S, Crew, follow_alone, follow_without_memory, lead_alone, spawn

DEGREES = (2, 4)
MAX_LOGIT_DIFFERENCE = 1e-4
DRAWN = {
    "dense experts": RandomShape(),
    "many experts": RandomShape(experts=24, experts_per_token=3, canvas=8, older_keys=True),
}
Answers = dict[str, list[tuple[int, ...]]]


@pytest.fixture(scope="module", params=[*TRAINED, *DRAWN])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    if request.param in DRAWN:
        return write_random_checkpoint(tmp_path_factory.mktemp("drawn"), DRAWN[request.param])
    return trained_checkpoint(request.param)


@pytest.fixture(scope="module")
def tiny() -> Path:
    torch.set_num_threads(1)
    return trained_checkpoint("models/tiny")


def jobs(folder: Path, count: int) -> list[EngineJob]:
    """Prompts of mixed tasks, every other one hot and hardly ever confident, so that draws and renoising decide."""
    checkpoint = read_checkpoint(folder)
    card, made = checkpoint.card, []
    for seed, prompt in enumerate(mixed_prompts(checkpoint, count)):
        sampling = replace(card.defaults, seed=seed, max_new_tokens=2 * card.canvas_tokens, max_denoising_steps=8)
        if seed % 2:
            sampling = replace(sampling, t_min=0.8, t_max=1.4, confidence_threshold=1e-7)
        made.append(EngineJob(f"job-{seed}", tuple(token % card.vocab_size for token in prompt), sampling))
    return made


def endless(card: ModelCard) -> EngineJob:
    """A job that is still at it whenever a test looks."""
    sampling = replace(card.defaults, max_denoising_steps=10**6, confidence_threshold=1e-30, t_max=2.0, t_min=1.9)
    return EngineJob("endless", (2, 3, 40, 4), sampling)


def answers(engine: Engine, work: Sequence[EngineJob]) -> Answers:
    waiting, made = list(work), Answers()
    while waiting or engine.stats().active_jobs:
        while waiting and engine.stats().active_jobs < engine.slots:
            engine.start(waiting.pop())
        for commit in engine.step().commits:
            made.setdefault(commit.job_id, []).append(commit.tokens)
    return made


def test_tokens_are_the_same_at_every_degree(folder: Path, crew: Crew) -> None:
    work = jobs(folder, 24)
    expected = answers(load_engine(folder, slots=4, device="cpu"), work)
    # Four ranks on a machine of two cores take turns: a part of the jobs has to do.
    for degree, count in zip(DEGREES, (24, 8), strict=True):
        with closing(crew.lead(folder, degree, slots=4)) as engine:
            for name, canvases in answers(engine, work[:count]).items():
                assert canvases == expected[name], (degree, name)


def shard_logits(
    group: Ranks, folder: Path, cases: Sequence[tuple[list[int], NDArray[np.int64]]]
) -> list[NDArray[np.float32]]:
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(folder)
    return [TileRunner(checkpoint, group=group).logits(context, canvas).numpy() for context, canvas in cases]


@pytest.mark.parametrize("degree", DEGREES)
def test_logits_are_the_references_at_every_degree_and_context_length(folder: Path, degree: int, crew: Crew) -> None:
    config = read_checkpoint(folder).config
    window, draws = config.sliding_window_tokens, np.random.default_rng(degree)
    cases = []
    for length in (1, window - 1, window, window + 1, 2 * window, 4 * window):
        context, canvas = (draws.integers(5, config.vocab_size, size) for size in (length, config.canvas_tokens))
        cases.append(([int(token) for token in context], canvas))
    reference = load_reference(folder)
    for (context, canvas), *parts in zip(cases, *crew.together(degree, shard_logits, folder, cases), strict=True):
        whole = torch.from_numpy(np.concatenate(parts, axis=-1))
        assert whole.shape[-1] == config.vocab_size
        expected = ReferenceRunner(reference).logits(context, canvas)
        assert float((whole - expected).abs().max()) <= MAX_LOGIT_DIFFERENCE, len(context)


def test_a_checkpoint_goes_on_at_another_degree(tiny: Path, crew: Crew) -> None:
    for number, job in enumerate(jobs(tiny, 4)):
        with (
            closing(load_engine(tiny, slots=1, device="cpu")) as alone,
            closing(crew.lead(tiny, 2, slots=1)) as pair,
        ):
            expected = answers(alone, [job])
            for first, second in ((alone, pair), (pair, alone)):
                first.start(job)
                made = [commit.tokens for _ in range(1 + number) for commit in first.step().commits]
                saved = first.checkpoint(job.job_id) if first.stats().active_jobs else None
                first.stop(job.job_id)
                if len(made) < len(expected[job.job_id]):
                    made += answers(second, [replace(job, committed=tuple(made), checkpoint=saved)])[job.job_id]
                assert made == expected[job.job_id]


def odd_sums(group: Ranks) -> bytes:
    """Sums whose bits depend on the order of the terms, at sizes that rings cut unevenly."""
    generator = torch.Generator().manual_seed(group.rank)
    sums = [group.sum(torch.randn(size, generator=generator) * 10.0**group.rank) for size in (1, 3, 97, 4096, 40_001)]
    return b"".join(total.numpy().tobytes() for total in sums)


@pytest.mark.parametrize("degree", DEGREES)
def test_a_sum_is_bit_equal_on_all_ranks(degree: int, crew: Crew) -> None:
    assert len(set(crew.together(degree, odd_sums))) == 1


@pytest.mark.parametrize("degree", DEGREES)
def test_a_rank_sends_as_many_bytes_as_the_formula_says(tiny: Path, degree: int, crew: Crew) -> None:
    config = read_checkpoint(tiny).config
    with closing(crew.lead(tiny, degree, slots=3)) as engine:
        group = engine._engine._group  # type: ignore[attr-defined]  # the count is nobody else's business
        for active in (1, 2, 3):
            # A prompt of its own, or there would be nothing to compute of it.
            engine.start(replace(endless(engine.card), job_id=str(active), prompt_tokens=(2, 3, 40 + active, 4)))
            before = group.sent_bytes
            engine.step()
            assert group.sent_bytes - before == step_bytes(config, degree, active, 1, 4), "a step with a prompt"
            before = group.sent_bytes
            engine.step()
            assert group.sent_bytes - before == step_bytes(config, degree, active, 0, 4)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_every_query_head_finds_its_own_kv_head_on_its_rank(kv_heads: int, world: int, tiny: Path) -> None:
    config, layer = replace(read_checkpoint(tiny).config, attention_heads=12), LayerConfig(True, 32, kv_heads)
    found = []
    for rank in range(world):
        cut = Shard(rank, world).heads(config, layer)
        own = list(range(12))[cut.queries]
        run = len(own) // len(cut.kv_heads)
        found += [cut.kv_heads[place // run] for place in range(len(own))]
    assert found == [head // (12 // kv_heads) for head in range(12)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [8, 9, 64, 96, 704, 262144])
def test_the_parts_of_a_cut_are_the_whole_in_order_and_none_is_empty(size: int, world: int) -> None:
    parts = [list(range(size))[Shard(rank, world).cut(size)] for rank in range(world)]
    assert list(chain(*parts)) == list(range(size))
    assert all(parts)


@pytest.mark.parametrize("world", [3, 0, 8])
def test_a_degree_that_does_not_divide_the_heads_is_refused_with_the_numbers(tiny: Path, world: int) -> None:
    with pytest.raises(ConfigError, match=f"degree is {world}; the model's 4 attention heads allow 1, 2, 4"):
        check_degree(read_checkpoint(tiny).config, world)
    with pytest.raises(ConfigError, match=f"degree is {world}"):
        lead_rank(tiny, Meeting(HOST, world, start_timeout_s=1), device="cpu")


def test_a_degree_above_a_size_that_is_cut_is_refused(tiny: Path) -> None:
    config = replace(read_checkpoint(tiny).config, expert_intermediate_size=3)
    with pytest.raises(ConfigError, match="moe_intermediate_size allows at most 3"):
        check_degree(config, 4)


def test_ranks_that_would_run_different_things_are_refused_on_both_sides(tiny: Path) -> None:
    meeting = Meeting(HOST, 2, start_timeout_s=WAIT_S)
    process, _ = spawn(follow_alone, tiny, meeting.rendezvous, 1)
    with pytest.raises(ConfigError, match="rank 1 has slots 1, rank 0 has 7"):
        lead_rank(tiny, meeting, device="cpu", slots=7)
    process.join(WAIT_S)
    assert process.exitcode == 1


def test_ranks_of_two_versions_of_easel_are_refused_whatever_else_differs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "__version__", "9.9.9")
    meeting = Meeting(HOST, 2, start_timeout_s=WAIT_S)
    process, _ = spawn(follow_alone, tiny, meeting.rendezvous, 1)
    with pytest.raises(ConfigError, match=rf"rank 1 has Easel version {__version__}, rank 0 has 9\.9\.9"):
        lead_rank(tiny, meeting, device="cpu", slots=7)
    process.join(WAIT_S)
    assert process.exitcode == 1


def test_a_rank_that_never_comes_is_named(tiny: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ranks 1, 2, 3 did not come within 0\.2 s"):
        lead_rank(tiny, Meeting(HOST, 4, start_timeout_s=0.2), device="cpu")


def test_a_rank_that_is_known_not_to_come_is_not_waited_for(tiny: Path) -> None:
    def check() -> None:
        raise EngineError("rank 1 has died")

    with pytest.raises(EngineError, match="rank 1 has died"):
        lead_rank(tiny, Meeting(HOST, 2, start_timeout_s=WAIT_S, check=check), device="cpu")


def test_a_stranger_without_the_key_is_not_taken_for_a_rank(tiny: Path) -> None:
    meeting = Meeting(HOST, 2, start_timeout_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        stranger = pool.submit(join_lead, HOST, meeting.rendezvous.link_port, b"guessed", 1, WAIT_S)
        with pytest.raises(RuntimeError, match="rank 1 did not come"):
            lead_rank(tiny, meeting, device="cpu")
        with pytest.raises(ConnectionError):
            stranger.result(WAIT_S)


def test_what_a_follower_cannot_load_is_said_by_the_lead(tiny: Path) -> None:
    meeting = Meeting(HOST, 2, start_timeout_s=WAIT_S)
    process, _ = spawn(follow_without_memory, tiny, meeting.rendezvous, 1)
    with pytest.raises(RuntimeError, match="rank 1 cannot start: MemoryError: all 3 bytes are taken"):
        lead_rank(tiny, meeting, device="cpu", slots=1)
    process.join(WAIT_S)
    assert process.exitcode == 1


def test_a_rank_reads_its_part_of_the_files_and_no_more(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, read = read_checkpoint(tiny), list[int]()
    plain = weights._OpenFiles.tensor

    def counted(files: weights._OpenFiles, file: Path, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = plain(files, file, name, part)
        read[-1] += tensor.numel()
        return tensor

    monkeypatch.setattr(weights._OpenFiles, "tensor", counted)
    for shard in (Shard(), *(Shard(rank, 4) for rank in range(4))):
        read.append(0)
        load_weights(checkpoint, torch.float32, torch.device("cpu"), shard)

    def size(pattern: str) -> int:
        names = (name for name in checkpoint.tensors if re.search(pattern, name))
        return sum(math.prod(checkpoint.tensors[name].shape) for name in names)

    # Norms, routers and scalars are on every rank, and with two kv heads for four ranks a kv head is on two.
    everywhere = size(r"decoder.*(norm|router|layer_scalar)")
    assert sum(read[1:]) == read[0] + 3 * everywhere + size(r"decoder.*[kv]_proj")
    assert max(read[1:]) < 0.3 * read[0]


@pytest.mark.parametrize(("world", "sent_bytes"), [(2, 132_656_640), (4, 199_000_320), (8, 232_202_880)])
def test_the_traffic_of_the_large_model_is_as_documented(tiny: Path, world: int, sent_bytes: int) -> None:
    config = read_checkpoint(tiny).config
    large = replace(config, hidden_size=2816, canvas_tokens=256, layers=config.layers[:1] * 30)
    assert step_bytes(large, world, canvases=1, encode_tiles=0, element_bytes=2) == sent_bytes
    page = Path(__file__).parents[2] / "ARCHITECTURE.md"
    assert f"| {world} | {sent_bytes / 1e6:.1f} MB |" in page.read_text()


@contextmanager
def pair(folder: Path, step_timeout_s: float) -> Iterator[tuple[LeadEngine, BaseProcess]]:
    """Rank 0 here, and rank 1 in a process that this test may hurt."""
    meeting = Meeting(HOST, 2, step_timeout_s=step_timeout_s, start_timeout_s=WAIT_S)
    process, _ = spawn(follow_alone, folder, meeting.rendezvous, 1)
    try:
        with closing(lead_rank(folder, meeting, device="cpu", slots=1)) as engine:
            yield engine, process
    finally:
        process.kill()
        process.join()


def test_an_idle_follower_waits_longer_than_a_step_may_take(tiny: Path) -> None:
    with pair(tiny, step_timeout_s=1.0) as (engine, process):
        time.sleep(2.5)
        engine.start(endless(engine.card))
        assert engine.step().progress
        engine.close()
        process.join(WAIT_S)
        assert process.exitcode == 0


def test_a_killed_follower_breaks_the_leads_step(tiny: Path) -> None:
    with pair(tiny, step_timeout_s=WAIT_S) as (engine, process):
        engine.start(endless(engine.card))
        engine.step()
        assert engine.lost() is None
        process.kill()
        process.join()
        assert engine.lost() == "rank 1 left"
        with pytest.raises(RuntimeError, match="tensor-parallel group broke: rank 1 left"):
            engine.step()


def test_a_follower_that_dies_within_a_step_breaks_it(tiny: Path) -> None:
    with pair(tiny, step_timeout_s=WAIT_S) as (engine, process):
        engine.start(endless(engine.card))
        engine.step()
        os.kill(process.pid or 0, signal.SIGSTOP)
        # It wakes up dead, while rank 0 waits for its sums.
        os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"], os.environ)
        with pytest.raises(RuntimeError, match="tensor-parallel group broke"):
            engine.step()


def test_a_stuck_follower_fails_the_step_within_the_groups_timeout(tiny: Path) -> None:
    with pair(tiny, step_timeout_s=1.0) as (engine, process):
        engine.start(endless(engine.card))
        engine.step()
        os.kill(process.pid or 0, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="tensor-parallel group broke"):
            engine.step()
        os.kill(process.pid or 0, signal.SIGCONT)
        # It finds itself alone, and leaves.
        process.join(WAIT_S)
        assert process.exitcode == 1


@pytest.fixture
def led_apart(tiny: Path) -> Iterator[tuple[BaseProcess, Connection, BaseProcess]]:
    lead, pipe = spawn(lead_alone, tiny, 2)
    follower, _ = spawn(follow_alone, tiny, pipe.recv(), 1)
    yield lead, pipe, follower
    for process in (lead, follower):
        process.kill()
        process.join()


def test_a_killed_lead_ends_its_followers(led_apart: tuple[BaseProcess, Connection, BaseProcess]) -> None:
    lead, pipe, follower = led_apart
    for _ in range(random.randint(1, 5)):
        assert pipe.poll(WAIT_S)
        pipe.recv()
    lead.kill()
    follower.join(WAIT_S)
    assert follower.exitcode == 1
