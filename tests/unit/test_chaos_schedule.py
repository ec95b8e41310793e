"""What a chaos run asks for and what it kills: drawn from its seed, the same every time."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.chaos.jobs import CANVAS_TOKENS, Style, draw_job
from cluster.chaos.schedule import BLOCK, KillKind, draw_strike, pick_one
from cluster.config import StateSettings
from cluster.core import Priority
from cluster.rpc.prompts import build_request

LEASE_S = StateSettings().lease_ms / 1000


def test_a_job_is_a_function_of_seed_and_index() -> None:
    assert draw_job(7, 3) == draw_job(7, 3)
    assert draw_job(7, 3) != draw_job(7, 4)
    assert draw_job(7, 3) != draw_job(8, 3)


def test_a_strike_is_a_function_of_seed_and_index() -> None:
    assert draw_strike(7, 20) == draw_strike(7, 20)
    assert [draw_strike(7, index) for index in range(30)] != [draw_strike(8, index) for index in range(30)]


@pytest.mark.parametrize("seed", range(5))
def test_every_block_of_strikes_begins_with_one_of_each_kind(seed: int) -> None:
    for block in range(3):
        first = [draw_strike(seed, block * BLOCK + place).kind for place in range(len(KillKind))]
        assert set(first) == set(KillKind)


def test_the_order_of_the_kinds_depends_on_the_seed() -> None:
    orders = {tuple(draw_strike(seed, index).kind for index in range(len(KillKind))) for seed in range(10)}
    assert len(orders) > 5


def test_a_frozen_replica_sleeps_longer_than_its_lease() -> None:
    assert all(draw_strike(1, index).freeze_s > LEASE_S for index in range(50))


def test_every_choice_can_be_picked_and_none_beyond_the_last() -> None:
    assert [pick_one("abc", pick) for pick in (0.0, 0.34, 0.99999)] == ["a", "b", "c"]


def test_jobs_are_mixed_in_kind_priority_and_length() -> None:
    jobs = [draw_job(1, index) for index in range(400)]
    assert {job.style for job in jobs} == set(Style)
    assert {job.options["priority"] for job in jobs} == set(Priority)
    assert len({job.options["seed"] for job in jobs}) == len(jobs)
    long = [job for job in jobs if "max_denoising_steps" in job.options]
    assert 0.6 < len(long) / len(jobs) < 0.9
    assert {tokens for job in long if (tokens := job.options["max_new_tokens"])} == {
        CANVAS_TOKENS * canvases for canvases in range(4, 17)
    }


def test_every_job_is_a_request_that_can_be_sent() -> None:
    for index in range(100):
        job = draw_job(2, index)
        request = build_request(job.prompt, None, {**job.options, "request_id": "x"}, drafts=True)
        assert request.text == job.prompt
        assert request.sampling.seed == job.options["seed"]


def test_about_a_tenth_of_the_jobs_is_stopped_by_their_clients() -> None:
    styles = Counter(draw_job(3, index).style.stops_early for index in range(1000))
    assert 80 < styles[True] < 200
