"""Images through vLLM's own vision tower: they change answers, always alike, and a job goes on with them anywhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from cluster.core import Image
from deployments.engine.api import EngineJob, Progress
from deployments.engine.randomness import initial_canvas
from deployments.engine.torch_tp.engine import load_engine as load_torch
from deployments.engine.torch_tp.sampler import temperature
from deployments.engine.vllm_engine import VllmEngine
from tests.contract import test_engine_contract as suite
from tests.contract.engines import Maker, drive
from tests.oracle import load_reference
from tests.unit.images import damaged
from tests.vllm.conftest import Pool
from tests.vllm.driving import run_all, tokens_of, varied_jobs
from tests.vllm.seeing import seeing_checkpoint

IMAGE_TOKEN, FRAME = 7, (5, 6)
ENTROPY_TOLERANCE = 1e-4
# vLLM counts 69 positions for it, its vision tower makes 70: the last one is left out.
LONG_PX = (1190, 17)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_checkpoint(tmp_path_factory.mktemp("model") / "seeing")


@pytest.fixture(scope="module")
def pool(checkpoint: Path) -> Iterator[Pool]:
    pool = Pool(checkpoint)
    yield pool
    pool.close()


def scene(seed: int, width_px: int = 60, height_px: int = 40) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 255, (height_px, width_px, 3), dtype=np.uint8))


def file_of(pixels: Pillow.Image) -> Image:
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return Image(file.getvalue(), "image/png")


def blind(engine: VllmEngine, name: str = "job", canvases: int = 2) -> EngineJob:
    return replace(varied_jobs(engine.card, 5, canvases)[4], job_id=name, wants_drafts=True)


def seeing(job: EngineJob, *scenes: Pillow.Image) -> EngineJob:
    """The same job with images before its text."""
    tokens = job.prompt_tokens
    places = (IMAGE_TOKEN,) * len(scenes)
    return replace(job, prompt_tokens=(*tokens[:2], *places, *tokens[2:]), images=tuple(map(file_of, scenes)))


def answer(engine: VllmEngine, job: EngineJob) -> list[tuple[int, ...]]:
    engine.start(job)
    return drive(engine).canvases(job.job_id)


def first_step(engine: VllmEngine, job: EngineJob) -> Progress:
    engine.start(job)
    # Forwards over context come before it.
    report = next(report for report in iter(engine.step, None) if report.progress)
    engine.stop(job.job_id)
    return report.progress[0]


def test_the_contract_on_images_holds(make: Callable[[int], VllmEngine]) -> None:
    made: list[VllmEngine] = []

    def one_at_a_time(slots: int) -> VllmEngine:
        for engine in made:
            engine.close()
        made.append(make(slots))
        return made[-1]

    suite.test_images_are_taken_as_the_table_says(Maker("vllm", one_at_a_time))


def test_an_answer_depends_on_the_image_and_on_nothing_else(make: Callable[[int], VllmEngine]) -> None:
    engine = make(4)
    job = blind(engine)
    one, other = answer(engine, seeing(job, scene(1))), answer(engine, seeing(job, scene(2)))
    assert len({str(canvases) for canvases in (one, other, answer(engine, job))}) == 3
    assert answer(engine, seeing(job, scene(1))) == one
    both = answer(engine, seeing(job, scene(1), scene(2, 30, 200)))
    assert both != answer(engine, seeing(job, scene(2, 30, 200), scene(1)))
    # In one batch with others, and with vLLM's caches warm.
    jobs = [seeing(job, scene(1)), replace(seeing(job, scene(2)), job_id="other"), replace(job, job_id="blind")]
    found = tokens_of(run_all(engine, jobs)[1])
    assert [found["job", index] for index in range(2)] == one
    assert [found["other", index] for index in range(2)] == other


def test_jobs_without_images_are_those_of_the_torch_engine(make: Callable[[int], VllmEngine], checkpoint: Path) -> None:
    engine = make(8)
    jobs = varied_jobs(engine.card, 8, canvases=2)
    expected = tokens_of(run_all(load_torch(checkpoint, slots=8, device="cpu"), jobs)[1])
    assert tokens_of(run_all(engine, jobs)[1]) == expected


def test_a_job_with_images_goes_on_after_its_committed_canvases(make: Callable[[int], VllmEngine]) -> None:
    engine = make(1)
    job = seeing(blind(engine, canvases=3), scene(1), scene(2))
    whole = answer(engine, job)
    assert len(whole) == 3
    for done in (1, 2):
        engine.close()
        engine = make(1)
        assert answer(engine, replace(job, committed=tuple(whole[:done]))) == whole[done:]


def test_a_canvas_in_progress_goes_on_with_its_images(make: Callable[[int], VllmEngine]) -> None:
    engine = make(1)
    job = seeing(blind(engine), scene(1))
    whole = answer(engine, job)
    engine.start(replace(job, committed=(whole[0],)))
    # Of these forwards, some are over context.
    run = drive(engine, steps=5)
    assert not run.commits
    saved = engine.checkpoint(job.job_id)
    assert saved is not None
    assert saved.canvas_index == 1
    engine.close()
    other = make(1)
    other.start(replace(job, committed=(whole[0],), checkpoint=saved))
    run = drive(other)
    assert run.steps(job.job_id)[0] == (1, saved.step + 1)
    assert run.canvases(job.job_id) == whole[1:]


def test_image_tokens_that_the_model_wrote_are_no_places(make: Callable[[int], VllmEngine]) -> None:
    engine = make(2)
    job, written = blind(engine), (IMAGE_TOKEN,) * engine.card.canvas_tokens
    assert len(answer(engine, replace(seeing(job, scene(1)), committed=(written,)))) == 1
    assert len(answer(engine, replace(job, committed=(written,)))) == 1


def test_an_image_that_does_not_decode_is_refused_before_any_compute(make: Callable[[int], VllmEngine]) -> None:
    engine = make(2)
    good, before = seeing(blind(engine, "good"), scene(1)), engine.stats()
    engine.start(good)
    bad = replace(good, job_id="bad", images=(Image(damaged(), "image/png"),))
    with pytest.raises(ValueError, match="images: image 1 of 1 does not decode"):
        engine.start(bad)
    assert engine.stats() == replace(before, active_jobs=1, pages_used=engine.stats().pages_used)
    assert len(drive(engine).canvases("good")) == 2


def test_images_of_every_shape_are_taken(make: Callable[[int], VllmEngine]) -> None:
    """vLLM counts an image's positions in the replica and makes them in its worker, which ends if they are too few."""
    engine = make(1)
    for size_px in (LONG_PX, LONG_PX[::-1], (1, 1), (2000, 1), (640, 480)):
        assert first_step(engine, seeing(blind(engine), scene(1, *size_px))).step == 1
    assert engine.lost() is None


@pytest.mark.parametrize("scenes", [(scene(1),), (scene(1), scene(2, 30, 200))], ids=["one", "two"])
def test_a_first_step_is_that_of_transformers_with_images_read_causally(
    make: Callable[[int], VllmEngine], checkpoint: Path, scenes: tuple[Pillow.Image, ...]
) -> None:
    """And not that of its `generate`, where the positions of an image see each other: docs/engines.md."""
    engine = make(1)
    job = seeing(blind(engine), *scenes)
    found, (causal, mutual) = first_step(engine, job), (reference(checkpoint, job, mutual) for mutual in (False, True))
    scores = torch.log_softmax(causal / temperature(job.sampling, 1), dim=-1)
    entropy = -(scores.exp() * scores).sum(dim=-1).mean()
    assert list(found.draft_tokens) == causal.argmax(dim=-1).tolist()
    assert found.mean_entropy == pytest.approx(float(entropy), abs=ENTROPY_TOLERANCE)
    assert list(found.draft_tokens) != mutual.argmax(dim=-1).tolist()


def reference(checkpoint: Path, job: EngineJob, mutual: bool) -> Any:  # noqa: ANN401
    """transformers' logits [canvas_tokens, vocab] of a first step; `mutual`: with the mask of its `generate`."""
    from transformers import AutoProcessor, DynamicCache

    model = load_reference(checkpoint)
    pictures = [Pillow.open(io.BytesIO(image.data)) for image in job.images]
    prepared = AutoProcessor.from_pretrained(checkpoint).image_processor(pictures, return_tensors="pt")
    counts = iter(np.asarray(prepared["num_soft_tokens_per_image"]).tolist())
    framed = (
        [FRAME[0], *[IMAGE_TOKEN] * next(counts), FRAME[1]] if token == IMAGE_TOKEN else [token]
        for token in job.prompt_tokens
    )
    tokens = torch.tensor([[token for part in framed for token in part]])
    positions = torch.arange(tokens.shape[1])[None]
    mask = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.zeros(1, tokens.shape[1], 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
        mm_token_type_ids=(tokens == IMAGE_TOKEN).long(),
    )
    canvas = initial_canvas(job.sampling.seed, 0, model.config.canvas_length, model.config.text_config.vocab_size)
    with torch.no_grad():
        output = model(
            input_ids=tokens,
            decoder_input_ids=torch.from_numpy(canvas)[None],
            pixel_values=prepared["pixel_values"],
            image_position_ids=prepared["image_position_ids"],
            past_key_values=DynamicCache(config=model.config.text_config),
            attention_mask=mask if mutual else None,
        )
    return output.logits[0]
