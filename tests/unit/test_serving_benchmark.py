"""The serving benchmark's own parts: arrivals, what is counted, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.engine import CHECKPOINT, mixed_prompts
from benchmarks.plots import draw, numbers_of
from benchmarks.serving import (
    PREFIX_TOKENS,
    Arrival,
    Point,
    Served,
    make_engine,
    poisson_arrivals,
    prompts_with_prefix,
    serve_with_engine,
)
from cluster.checkpoint import Checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.set_num_threads(1)
    if not (CHECKPOINT / "config.json").is_file():
        pytest.skip("models/tiny is not here")
    return read_checkpoint(CHECKPOINT)


def some_point() -> Point:
    ours = Served(tokens=300, wall_s=2.0, latencies_s=[0.2, 0.1, 0.4, 0.3])
    theirs = Served(tokens=100, wall_s=2.0, latencies_s=[0.6, 0.6, 0.6, 0.6])
    return Point(8, [ours], [theirs])


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    prompts = [(1,)] * 4000
    arrivals = poisson_arrivals(prompts, jobs_per_s=20.0, seed=3)
    assert arrivals == poisson_arrivals(prompts, jobs_per_s=20.0, seed=3)
    gaps = torch.tensor([arrival.at_s for arrival in arrivals]).double().diff()
    # An exponential distribution's mean and deviation are equal.
    assert float(gaps.mean()) == pytest.approx(1 / 20, rel=0.1)
    assert float(gaps.std()) == pytest.approx(1 / 20, rel=0.1)


def test_every_arrival_is_answered_and_counted_once(checkpoint: Checkpoint) -> None:
    prompts = mixed_prompts(checkpoint, 5)
    engine = make_engine(checkpoint, slots=2)
    served = serve_with_engine(engine, [Arrival(0.01 * number, prompt) for number, prompt in enumerate(prompts)])
    at_once = serve_with_engine(engine, [Arrival(0.0, prompt) for prompt in prompts])
    assert len(served.latencies_s) == 5
    assert served.tokens == at_once.tokens > 0
    assert min(served.latencies_s) > 0


def test_ratios_are_of_medians() -> None:
    assert some_point().throughput_ratio == 3.0
    assert some_point().latency_ratio == pytest.approx(0.5)


def test_prompts_with_a_prefix_share_it_and_nothing_more(checkpoint: Checkpoint) -> None:
    prompts = prompts_with_prefix(checkpoint, 12)
    assert len({prompt[:PREFIX_TOKENS] for prompt in prompts}) == 1
    assert len({prompt[PREFIX_TOKENS:] for prompt in prompts}) == 12
    assert len({prompt[PREFIX_TOKENS : PREFIX_TOKENS + 1] for prompt in prompts}) > 1


def test_plots_are_drawn_from_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = draw([some_point(), some_point()], tmp_path / "img")
    assert [path.name for path in paths] == ["throughput.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert json.loads(json.dumps(numbers_of(some_point())))["engine_tokens_per_s"] == 150.0
