"""What every engine must do, whatever computes its tokens. A new engine joins by one line in engines.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from cluster.core import Image, ModelCard
from deployments.engine.api import CanvasCheckpoint, Commit, Engine, EngineJob
from deployments.engine.fake import FakeEngine
from tests.contract.engines import ENGINES, FAKE_CARD, Maker, Run, alone, drive, torch_pair
from tests.oracle import encode
from tests.unit.images import picture


@pytest.fixture(params=ENGINES)
def maker(request: pytest.FixtureRequest) -> Iterator[Maker]:
    made: list[Engine] = []
    make_one = ENGINES[request.param]
    # Only who runs on several ranks needs the processes for them.
    more = (request.getfixturevalue("crew"),) if make_one is torch_pair else ()

    def make(slots: int) -> Engine:
        made.append(make_one(slots, *more))
        return made[-1]

    yield Maker(request.param, make)
    for engine in made:
        engine.close()
        engine.close()


def test_an_idle_engine_steps_into_an_empty_report(maker: Maker) -> None:
    report = maker.make(2).step()
    assert not report.progress
    assert not report.commits


def test_steps_count_from_one_and_every_canvas_ends_with_a_commit(maker: Maker) -> None:
    engine = maker.make(1)
    job = maker.job(engine, "a")
    engine.start(job)
    run = drive(engine)
    expected = [(c.canvas_index, step) for c in run.commits for step in range(1, c.denoising_steps + 1)]
    assert run.steps("a") == expected
    assert [commit.canvas_index for commit in run.commits] == list(range(len(run.commits)))
    assert [commit.last for commit in run.commits] == [False] * (len(run.commits) - 1) + [True]
    assert all(len(commit.tokens) == engine.card.canvas_tokens for commit in run.commits)
    assert all(commit.denoising_steps <= job.sampling.max_denoising_steps for commit in run.commits)
    assert all(step.mean_entropy >= 0 for step in run.progress)
    assert all(0 <= step.accepted_tokens <= engine.card.canvas_tokens for step in run.progress)


def test_a_job_ends_at_its_number_of_canvases_or_at_eos(maker: Maker) -> None:
    engine = maker.make(8)
    jobs = [maker.job(engine, f"job-{number}", number, canvases=1 + number % 3) for number in range(6)]
    for job in jobs:
        engine.start(job)
    run = drive(engine)
    for number, job in enumerate(jobs):
        canvases = run.canvases(job.job_id)
        has_eos = [not set(canvas).isdisjoint(engine.card.eos_token_ids) for canvas in canvases]
        assert not any(has_eos[:-1])
        assert has_eos[-1] or len(canvases) == 1 + number % 3


def test_an_eos_inside_a_canvas_is_the_jobs_last(maker: Maker) -> None:
    if maker.kind == "fake":
        engine: Engine = FakeEngine(FAKE_CARD, answer_tokens=11)
    else:
        engine = maker.make(1)
    sampling = replace(engine.card.defaults, max_new_tokens=6 * engine.card.canvas_tokens)
    engine.start(EngineJob("a", encode("sort 40718"), sampling))
    run = drive(engine)
    assert len(run.commits) < 6
    assert not set(run.commits[-1].tokens).isdisjoint(engine.card.eos_token_ids)
    assert engine.stats().active_jobs == 0


def test_reports_keep_the_order_in_which_jobs_started(maker: Maker) -> None:
    engine = maker.make(4)
    # Contexts of falling length, so that no order by length can pass for the order of starts.
    names = ["long", "middle", "short"]
    for name, number in zip(names, (2, 1, 3), strict=True):
        engine.start(maker.job(engine, name, number))
    for _ in range(4):
        seen = [step.job_id for step in engine.step().progress]
        assert seen == [name for name in names if name in seen]


def test_no_more_jobs_than_slots(maker: Maker) -> None:
    engine = maker.make(2)
    engine.start(maker.job(engine, "a"))
    engine.start(maker.job(engine, "b"))
    with pytest.raises(RuntimeError, match="slots"):
        engine.start(maker.job(engine, "c"))
    assert engine.stats().active_jobs == 2
    engine.stop("a")
    engine.start(maker.job(engine, "c"))
    assert engine.stats().active_jobs == 2


def test_an_active_id_is_refused_and_the_active_job_goes_on(maker: Maker) -> None:
    engine = maker.make(2)
    job = maker.job(engine, "a")
    expected = alone(maker, job)
    engine.start(job)
    with pytest.raises(KeyError):
        engine.start(maker.job(engine, "a", number=1))
    assert drive(engine).canvases("a") == expected


def bad_jobs(card: ModelCard, good: EngineJob) -> dict[str, EngineJob]:
    whole = (5,) * card.canvas_tokens
    too_long = replace(good.sampling, max_new_tokens=card.max_context_tokens)
    return {
        "empty prompt": replace(good, prompt_tokens=()),
        "token out of vocabulary": replace(good, prompt_tokens=(5, card.vocab_size)),
        "negative token": replace(good, prompt_tokens=(5, -1)),
        "prompt too long": replace(good, prompt_tokens=(5,) * card.max_context_tokens),
        "answer too long": replace(good, sampling=too_long),
        "no answer": replace(good, sampling=replace(good.sampling, max_new_tokens=0)),
        "committed canvas too short": replace(good, committed=(whole[1:],)),
        "committed token out of vocabulary": replace(good, committed=((card.vocab_size, *whole[1:]),)),
        "all canvases committed": replace(good, committed=(whole,) * 3),
        "seed out of range": replace(good, sampling=replace(good.sampling, seed=2**64)),
    }


def test_a_job_that_does_not_fit_is_refused_and_leaves_nothing_behind(maker: Maker) -> None:
    engine = maker.make(1)
    good = maker.job(engine, "a")
    before = engine.stats()
    for name, job in bad_jobs(engine.card, good).items():
        with pytest.raises(ValueError, match=r"\d|empty") as refusal:
            engine.start(job)
        assert "\n" not in str(refusal.value), name
        assert engine.stats() == before, name
    engine.start(good)
    assert drive(engine).canvases("a") == alone(maker, good)


def test_stop_frees_the_slot_at_once_and_forgets_the_job(maker: Maker) -> None:
    engine = maker.make(1)
    job, other = maker.job(engine, "a"), maker.job(engine, "b", number=1)
    expected = alone(maker, other)
    engine.start(job)
    drive(engine, steps=2)
    engine.stop("a")
    engine.stop("a")
    engine.stop("never there")
    assert engine.stats().active_jobs == 0
    assert engine.stats().pages_used == 0
    with pytest.raises(KeyError):
        engine.checkpoint("a")
    engine.start(other)
    assert drive(engine).canvases("b") == expected


def test_a_job_does_not_depend_on_its_batch_mates(maker: Maker) -> None:
    engine = maker.make(4)
    jobs = [maker.job(engine, f"job-{number}", number) for number in range(7)]
    expected = {job.job_id: alone(maker, job) for job in jobs}
    waiting, run = list(jobs), Run([], [])
    # Starts are spread over steps, so that prompts, commits and steps of all phases meet.
    while waiting or engine.stats().active_jobs:
        if waiting and engine.stats().active_jobs < engine.slots:
            engine.start(waiting.pop())
        run.commits += engine.step().commits
    assert {name: run.canvases(name) for name in expected} == expected


def test_a_retry_after_any_commit_gives_the_same_tokens(maker: Maker) -> None:
    engine = maker.make(2)
    for number in range(3):
        job = maker.job(engine, f"job-{number}", number)
        whole = alone(maker, job)
        for kept in range(len(whole)):
            again = replace(job, committed=tuple(whole[:kept]))
            engine.start(again)
            assert drive(engine).canvases(job.job_id) == whole[kept:]


def commits_of(runs: Sequence[Run], name: str) -> list[tuple[int, ...]]:
    return [canvas for run in runs for canvas in run.canvases(name)]


def test_a_checkpoint_resumes_bit_for_bit_in_another_engine(maker: Maker) -> None:
    for cut in (1, 2, 4, 7, 8):
        first = maker.make(2)
        job, mate = maker.job(first, "a", number=1), maker.job(first, "mate", number=2)
        expected = alone(maker, job)
        second = maker.make(3)
        first.start(job)
        runs = [drive(first, steps=cut)]
        saved = first.checkpoint("a")
        if saved is not None:
            assert saved.canvas_index == len(runs[0].canvases("a"))
            assert saved.step == runs[0].steps("a")[-1][1]
        second.start(mate)
        second.start(replace(job, committed=tuple(runs[0].canvases("a")), checkpoint=saved))
        runs.append(drive(second))
        assert commits_of(runs, "a") == expected
        again = [step for run in runs for step in run.steps("a")]
        assert len(again) == len(set(again)), "no step is done twice"
        first.close()
        second.close()


def test_there_is_no_checkpoint_at_a_canvas_boundary(maker: Maker) -> None:
    engine = maker.make(1)
    engine.start(maker.job(engine, "a", number=1))  # an answer of several canvases
    assert engine.checkpoint("a") is None
    commits: tuple[Commit, ...] = ()
    while not commits:
        report = engine.step()
        commits = report.commits
        # A step may compute nothing but the prompt.
        if report.progress and not commits:
            assert engine.checkpoint("a") is not None
    if not commits[0].last:
        assert engine.checkpoint("a") is None
    with pytest.raises(KeyError):
        engine.checkpoint("b")


def broken(saved: CanvasCheckpoint) -> dict[str, CanvasCheckpoint]:
    middle = len(saved.payload) // 2
    flipped = bytes([saved.payload[middle] ^ 1])
    return {
        "of another version": replace(saved, version="another"),
        "of another canvas": replace(saved, canvas_index=saved.canvas_index + 1),
        "with a flipped bit": replace(saved, payload=saved.payload[:middle] + flipped + saved.payload[middle + 1 :]),
        "cut short": replace(saved, payload=saved.payload[:-1]),
        "empty": replace(saved, payload=b""),
    }


def test_a_checkpoint_that_cannot_be_trusted_is_refused(maker: Maker) -> None:
    engine = maker.make(1)
    job = maker.job(engine, "a")
    engine.start(job)
    drive(engine, steps=2)
    saved = engine.checkpoint("a")
    assert saved is not None
    engine.stop("a")
    for checkpoint in broken(saved).values():
        with pytest.raises(ValueError, match="checkpoint"):
            engine.start(replace(job, checkpoint=checkpoint))
        assert engine.stats().active_jobs == 0
    engine.start(replace(job, checkpoint=saved))
    assert drive(engine).steps("a")[0] == (0, saved.step + 1)


def test_drafts_come_only_when_asked_for(maker: Maker) -> None:
    engine = maker.make(2)
    plain, watched = maker.job(engine, "plain"), replace(maker.job(engine, "watched"), wants_drafts=True)
    engine.start(plain)
    engine.start(watched)
    run = drive(engine)
    assert run.canvases("plain") == run.canvases("watched")
    for step in run.progress:
        assert len(step.draft_tokens) == (engine.card.canvas_tokens if step.job_id == "watched" else 0)
    # What a canvas commits is its last draft.
    last = {step.canvas_index: step.draft_tokens for step in run.progress if step.job_id == "watched"}
    assert list(last.values()) == run.canvases("watched")


def test_images_are_taken_as_the_table_says(maker: Maker) -> None:
    engine = maker.make(1)
    good = maker.job(engine, "a")
    image = Image(picture(), "image/png")
    # An image without a place in the prompt is refused by everybody.
    with pytest.raises(ValueError, match="images: the job brings 1"):
        engine.start(replace(good, images=(image,)))
    assert engine.stats().active_jobs == 0
    place = () if engine.card.vision is None else (engine.card.vision.image_token_id,)
    seeing = replace(good, prompt_tokens=good.prompt_tokens + place, images=(image,))
    if maker.traits.images and engine.card.vision is not None:
        assert alone(maker, seeing) == alone(maker, seeing) != []
        return
    why = "the checkpoint has no vision part" if maker.traits.images else "the engine takes none"
    with pytest.raises(ValueError, match=f"images: the job brings 1; {why}"):
        engine.start(seeing)
    assert engine.stats().active_jobs == 0


def test_prefixes_are_reused_as_the_table_says(maker: Maker) -> None:
    engine = maker.make(1)
    for name in ("first", "again"):
        engine.start(maker.job(engine, name, number=2, canvases=1))
        drive(engine)
    assert (engine.stats().prefix_hit_tokens > 0) == maker.traits.prefix_reuse


def test_stats_count_what_was_done(maker: Maker) -> None:
    engine = maker.make(2)
    jobs = [maker.job(engine, "a"), maker.job(engine, "b", number=1)]
    for job in jobs:
        engine.start(job)
    run = drive(engine)
    stats = engine.stats()
    assert stats.canvas_steps == len(run.progress)
    assert stats.canvases == len(run.commits)
    assert 0 < stats.denoising_steps <= stats.canvas_steps
    assert stats.prefill_tokens >= sum(len(job.prompt_tokens) for job in jobs)
    assert stats.active_jobs == stats.pages_used == 0
