"""Recorded denoising steps: the same tokens as without, each step done once, and nothing in one that waits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, read_checkpoint
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp import experts, step_graph, weights
from deployments.engine.torch_tp.attention import HeadMemory
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.group import Solo
from tests.oracle import RandomShape, encode, trained_checkpoint, write_random_checkpoint
from tests.recording import CpuRecorder, Tape, Waits

PROMPTS = ("count 31 to 38", "upper amber tile and more words, longer than one tile", "sort 40718", "reverse 40718")


@pytest.fixture(scope="module", params=["models/tiny", "tiny-undertrained"])
def trained(request: pytest.FixtureRequest) -> Checkpoint:
    torch.set_num_threads(1)
    return read_checkpoint(trained_checkpoint(request.param))


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    torch.set_num_threads(1)
    return read_checkpoint(trained_checkpoint("models/tiny"))


@pytest.fixture(autouse=True)
def record_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short tests replay much, and have more shapes than there is room for."""
    monkeypatch.setattr(step_graph, "RECORD_AT_STEP", 1)
    monkeypatch.setattr(step_graph, "MAX_RECORDINGS", 4)


def engine(checkpoint: Checkpoint, recorder: CpuRecorder | None, slots: int = 4, **settings: str | int) -> TorchEngine:
    chosen = EngineSettings(slots=slots, device="cpu", **settings)  # type: ignore[arg-type]  # by field
    return TorchEngine(checkpoint, chosen, recorder=recorder)


def job(checkpoint: Checkpoint, number: int, steps: int = 12) -> EngineJob:
    sampling = replace(
        checkpoint.card.defaults,
        seed=100 + number,
        max_new_tokens=(1 + number % 3) * checkpoint.card.canvas_tokens,
        max_denoising_steps=steps + number % 2,
        t_max=(0.8, 1.5, 0.5)[number % 3],
        entropy_bound=(0.02, 0.3)[number % 2],
        stability_threshold=100,  # every canvas takes all its steps
    )
    # Random checkpoints have fewer tokens than characters.
    prompt = tuple(token % checkpoint.card.vocab_size for token in encode(PROMPTS[number % len(PROMPTS)]))
    return EngineJob(f"job-{number}", prompt, sampling)


def history(runner: TorchEngine, checkpoint: Checkpoint) -> list[object]:
    """Everything that an engine reports while jobs join, leave, are stopped and come back from checkpoints."""
    seen: list[object] = []
    committed: list[tuple[int, ...]] = []
    waiting, to_stop, to_move = [job(checkpoint, number) for number in range(8)], True, True
    for number in range(400):
        if waiting and runner.stats().active_jobs < runner.slots and number % 2 == 0:
            runner.start(waiting.pop(0))
        report = runner.step()
        seen.append(report)
        committed += [commit.tokens for commit in report.commits if commit.job_id == "job-2"]
        steps = {progress.job_id: progress.step for progress in report.progress}
        if to_stop and steps.get("job-1") == 4:
            runner.stop("job-1")
            to_stop = False
        if to_move and steps.get("job-2") == 3:
            saved = runner.checkpoint("job-2")
            seen.append(saved)
            runner.stop("job-2")
            waiting.append(replace(job(checkpoint, 2), committed=tuple(committed), checkpoint=saved))
            to_move = False
        if not waiting and not runner.stats().active_jobs:
            assert not to_stop
            assert not to_move
            return seen
    raise AssertionError("the engine does not come to an end")


def test_replayed_steps_report_what_steps_without_recordings_report(trained: Checkpoint) -> None:
    recorder = CpuRecorder()
    assert history(engine(trained, recorder), trained) == history(engine(trained, None), trained)
    # More shapes than there is room for, so recordings were let go and made again.
    assert recorder.recorded > 4
    assert recorder.replayed > 10


def test_jobs_that_take_the_same_places_share_a_recording_and_no_token(tiny: Checkpoint) -> None:
    recorder = CpuRecorder()
    runner, plain = engine(tiny, recorder, slots=1), engine(tiny, None, slots=1)
    for number in range(6):
        same = replace(job(tiny, number), prompt_tokens=encode(f"sort 4071{number}"))
        reports = []
        for one in (runner, plain):
            one.start(same)
            reports.append([one.step() for _ in range(6)])
            one.stop(same.job_id)
        assert reports[0] == reports[1]
    assert recorder.recorded < 4
    assert recorder.replayed > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_grouped_experts_can_be_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(weights, "MAX_DENSE_EXPERTS", 1)
    monkeypatch.setattr(experts, "_has_grouped_product", lambda weight: True)
    drawn = read_checkpoint(write_random_checkpoint(tmp_path, RandomShape()))
    recorder = CpuRecorder()
    assert history(engine(drawn, recorder, dtype=dtype), drawn) == history(engine(drawn, None, dtype=dtype), drawn)
    assert recorder.replayed


def test_grouped_experts_compute_what_one_by_one_gives(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((3, 8, 16), (6, 48, 16), (6, 16, 24)))
    # Experts 0 and 4 are nobody's: the first and one in the middle have no rows.
    chosen = torch.tensor([1, 2, 3, 5])[torch.rand(3, 8, 4, generator=generator).topk(2).indices]
    with torch.inference_mode():
        grouped, single = (run(rows, chosen, gate_up, down) for run in (experts._grouped, experts._one_by_one))
    assert torch.allclose(grouped, single, atol=1e-5)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x.long()),
        torch.nonzero,
        lambda x: bool(x.any()),
        lambda x: x + torch.tensor([1.0]),
        torch.unique,
        lambda x: x[[0, 1]],
    ],
)
def test_the_recorder_of_these_tests_refuses_what_cuda_could_not_record(waits: object) -> None:
    with torch.inference_mode(), Tape(), pytest.raises(Waits):
        waits(torch.ones(4))  # type: ignore[operator]


def test_a_shape_is_recorded_when_it_comes_back_and_no_sooner(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graph, "RECORD_AT_STEP", 3)
    recorder = CpuRecorder()
    runner = engine(tiny, recorder, slots=1)
    runner.start(replace(job(tiny, 0, steps=20), prompt_tokens=encode("sort 1")))
    # With the prompt's tile: no step that is counted.
    runner.step()
    counts = []
    for _ in range(5):
        runner.step()
        counts.append((recorder.recorded, recorder.replayed))
    assert counts == [(0, 0), (0, 0), (1, 0), (1, 1), (1, 2)]


def test_a_step_that_cannot_be_recorded_is_told_once_and_all_run_without(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = CpuRecorder()
    recorder.fails = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        assert history(engine(tiny, recorder), tiny) == history(engine(tiny, None), tiny)
    (record,) = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert "not permitted" in record.message
    assert recorder.released == 1


def test_when_memory_runs_out_recordings_are_given_up_and_the_step_is_done_again(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = CpuRecorder()
    runner = engine(tiny, recorder)
    original, failing = runner._model.logits, [15]

    def logits(hidden: Tensor) -> Tensor:
        failing[0] -= 1
        if failing[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(hidden)

    monkeypatch.setattr(runner._model, "logits", logits)
    assert history(runner, tiny) == history(engine(tiny, None), tiny)
    assert recorder.replayed
    assert recorder.released == 1


def test_no_step_moves_the_memory_that_recordings_work_in(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine(tiny, CpuRecorder(), prefill_tiles_per_step=1)
    monkeypatch.setattr(HeadMemory, "_grow", lambda self, tiles: pytest.fail(f"grew to {tiles} tiles"))
    history(runner, tiny)


def test_steps_are_not_recorded_when_it_is_turned_off_or_ranks_wait_for_each_other(tiny: Checkpoint) -> None:
    class Pair(Solo):
        world = 2

    recorder = CpuRecorder()
    off = TorchEngine(tiny, EngineSettings(device="cpu", cuda_graphs=False), recorder=recorder)
    pair = TorchEngine(tiny, EngineSettings(device="cpu"), group=Pair(), recorder=recorder)
    assert off._graphs is pair._graphs is engine(tiny, None)._graphs is None
