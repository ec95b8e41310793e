"""Engines for the contract suite, jobs that fit them, and what drives them to the end of their work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from cluster.checkpoint import read_checkpoint
from cluster.core import ModelCard, SamplingParams
from cluster.engines import ENGINES as TABLE
from cluster.engines import EngineTraits
from deployments.engine.api import Commit, Engine, EngineJob, Progress
from deployments.engine.fake import FakeEngine
from tests.oracle import encode, some_checkpoint
from tests.ranks import Crew

PROMPTS = (
    "count 31 to 38",
    "Order 4821 from Acme Tools ships to Oslo on 2024-05-17.",
    "upper amber tile and a few more words that make this prompt longer than one tile",
    "sort 40718",
    "reverse 40718",
)
MAX_STEPS = 400
FAKE_SAMPLING = SamplingParams(0, 24, 6, 0.1, 0.4, 0.8, 0.005, 1)
FAKE_CARD = ModelCard("fake", "v1", 128, 8, 256, 2, 0, (1,), FAKE_SAMPLING)


@dataclass(frozen=True)
class Maker:
    """Makes engines of one kind, and jobs that fit them."""

    kind: str
    make: Callable[[int], Engine]

    @property
    def traits(self) -> EngineTraits:
        """The engine's column of the table."""
        return TABLE[self.kind.split()[0]]

    def job(self, engine: Engine, name: str, number: int = 0, canvases: int = 3) -> EngineJob:
        card = engine.card
        sampling = replace(
            card.defaults,
            seed=100 + number,
            max_new_tokens=canvases * card.canvas_tokens,
            max_denoising_steps=6,
            # Bounds that make the torch engine take several steps and renoise on the way.
            entropy_bound=0.02,
            confidence_threshold=1e-6,
        )
        return EngineJob(name, encode(PROMPTS[number % len(PROMPTS)]), sampling)


def fake(slots: int) -> Engine:
    return FakeEngine(FAKE_CARD, slots=slots)


def torch_engine(slots: int) -> Engine:
    from deployments.engine.torch_tp.engine import load_engine

    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    return load_engine(path, slots=slots, device="cpu")


def torch_recorded(slots: int) -> Engine:
    """Steps are recorded and replayed, as on CUDA."""
    from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
    from tests.recording import CpuRecorder

    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    return TorchEngine(read_checkpoint(path), EngineSettings(slots=slots, device="cpu"), recorder=CpuRecorder())


def torch_pair(slots: int, crew: Crew) -> Engine:
    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    return crew.lead(path, 2, slots=slots)


ENGINES: dict[str, Callable[..., Engine]] = {
    "fake": fake,
    "torch": torch_engine,
    "torch recorded": torch_recorded,
    "torch on two ranks": torch_pair,
}


@dataclass
class Run:
    """Everything an engine reported until nothing was active."""

    progress: list[Progress]
    commits: list[Commit]

    def canvases(self, name: str) -> list[tuple[int, ...]]:
        return [commit.tokens for commit in self.commits if commit.job_id == name]

    def steps(self, name: str) -> list[tuple[int, int]]:
        return [(step.canvas_index, step.step) for step in self.progress if step.job_id == name]


def drive(engine: Engine, steps: int | None = None) -> Run:
    """Steps until idle, or `steps` times."""
    run = Run([], [])
    for _ in range(MAX_STEPS if steps is None else steps):
        if not engine.stats().active_jobs:
            break
        report = engine.step()
        run.progress += report.progress
        run.commits += report.commits
    else:
        assert steps is not None, "the engine does not come to an end"
    return run


def alone(maker: Maker, job: EngineJob) -> list[tuple[int, ...]]:
    engine = maker.make(1)
    engine.start(job)
    canvases = drive(engine).canvases(job.job_id)
    engine.close()
    return canvases
