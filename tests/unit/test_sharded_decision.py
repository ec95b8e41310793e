"""A decision on shards of the vocabulary is the decision on the whole: draws, ties, entropy, self-conditioning."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import read_checkpoint
from deployments.engine.admission import DIGEST_BYTES
from deployments.engine.api import Engine, EngineJob
from deployments.engine.torch_tp.decision import decision
from deployments.engine.torch_tp.engine import load_engine
from deployments.engine.torch_tp.group import Group, Solo
from deployments.engine.torch_tp.sampler import StepInputs, StepOutputs
from deployments.engine.torch_tp.shard import Shard
from tests.oracle import encode, trained_checkpoint
from tests.ranks import Crew

TILES, ROWS, HIDDEN = 2, 16, 12


@dataclass(frozen=True)
class Head:
    """What a decision needs of a model: scores and embeddings of the tokens from `first_token` on."""

    scores: Tensor
    embedding: Tensor
    first_token: int
    dtype: torch.dtype

    def logits(self, _: Tensor) -> Tensor:
        return self.scores.clone()

    def expected_embedding(self, probabilities: Tensor) -> Tensor:
        return probabilities.to(self.dtype) @ self.embedding.to(self.dtype)

    def soft_embedding(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        if self.dtype != torch.float32:
            probabilities = torch.softmax(scores.to(self.dtype), dim=-1, dtype=torch.float32)
        return self.expected_embedding(probabilities)


def drawn(vocab: int) -> tuple[Tensor, Tensor, StepInputs]:
    """Scores, embeddings and inputs; row 0 of every tile is flat, row 1 has its best in every shard, row 2 is sure."""
    generator = torch.Generator().manual_seed(vocab)
    scores = 4 * torch.randn(TILES, ROWS, vocab, generator=generator)
    scores[:, 0] = 0.0
    scores[:, 1, 1 :: max(vocab // 8, 1)] = 25.0
    scores[:, 2, vocab - 1] = 300.0
    uniforms = torch.rand(TILES, ROWS, generator=generator, dtype=torch.float64)
    uniforms[0, :3], uniforms[1, :3] = 0.0, 1 - 2.0**-53
    inputs = StepInputs(
        temperatures=torch.tensor([0.7, 1.3]).view(TILES, 1, 1),
        entropy_bounds=torch.tensor([[2.5], [50.0]]),
        uniforms=uniforms,
        replacements=torch.full((TILES, ROWS), vocab - 2),
    )
    return scores, torch.randn(vocab, HIDDEN, generator=generator), inputs


def decide(group: Group, vocab: int, dtype: torch.dtype) -> StepOutputs:
    scores, embedding, inputs = drawn(vocab)
    own = Shard(group.rank, group.world).cut(vocab)
    head = Head(scores[..., own].contiguous(), embedding[own], own.start, dtype)
    with torch.inference_mode():
        outputs = decision(head, group)(torch.empty(0), inputs)  # type: ignore[arg-type]  # a part of Model
    return StepOutputs(*(getattr(outputs, name).clone() for name in StepOutputs.__slots__))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("vocab", [7, 96, 4000])
def test_shards_decide_as_the_whole_does(vocab: int, world: int, crew: Crew) -> None:
    expected = decide(Solo(), vocab, torch.float32)
    for ours in crew.together(world, decide, vocab, torch.float32):
        assert torch.equal(ours.argmax, expected.argmax)
        assert torch.equal(ours.next_canvas, expected.next_canvas)
        assert torch.equal(ours.accepted, expected.accepted)
        assert torch.allclose(ours.mean_entropy, expected.mean_entropy, rtol=1e-6)
        assert torch.allclose(ours.soft, expected.soft, atol=1e-6)
    assert expected.argmax[:, 1].tolist() == [1, 1]


def test_all_ranks_decide_bit_for_bit_alike(crew: Crew) -> None:
    first, *others = crew.together(4, decide, 4000, torch.float32)
    for other in others:
        assert all(torch.equal(getattr(first, name), getattr(other, name)) for name in StepOutputs.__slots__)


def test_bfloat16_shards_decide_as_the_whole_does(crew: Crew) -> None:
    expected = decide(Solo(), 4000, torch.bfloat16)
    ours, _ = crew.together(2, decide, 4000, torch.bfloat16)
    assert torch.equal(ours.argmax, expected.argmax)
    assert torch.equal(ours.next_canvas, expected.next_canvas), "a token travels exactly in bfloat16"
    assert torch.allclose(ours.soft, expected.soft, atol=3e-2)


def soft_after_two_steps(engine: Engine, job: EngineJob) -> NDArray[np.float32]:
    engine.start(job)
    engine.step()
    engine.step()
    saved = engine.checkpoint(job.job_id)
    assert saved is not None
    with np.load(io.BytesIO(saved.payload[DIGEST_BYTES:])) as arrays:
        soft: NDArray[np.float32] = arrays["soft"]
    return soft


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_the_self_conditioning_of_two_ranks_is_that_of_one(dtype: str, tolerance: float, crew: Crew) -> None:
    torch.set_num_threads(1)
    folder = trained_checkpoint("models/tiny")
    card = read_checkpoint(folder).card
    job = EngineJob("a", encode("sort 40718"), replace(card.defaults, seed=5, confidence_threshold=1e-9))
    with (
        closing(load_engine(folder, slots=1, device="cpu", dtype=dtype)) as alone,
        closing(crew.lead(folder, 2, slots=1, dtype=dtype)) as pair,
    ):
        one, two = soft_after_two_steps(alone, job), soft_after_two_steps(pair, job)
    assert float(np.abs(one - two).max()) <= tolerance * float(np.abs(one).max())
