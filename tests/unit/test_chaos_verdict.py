"""How a chaos run compares: what its readers got, what the cluster kept, and how soon a stream went on."""

from __future__ import annotations

import pytest

from cluster.chaos.recovery import Kill, percentile, recoveries
from cluster.chaos.schedule import KillKind
from cluster.chaos.transcript import Heard, Hearing, Seen, Transcript, redone_steps
from cluster.chaos.verdict import MISSING, Ending, judge
from cluster.client import Accepted, Answer, Committed, Draft, Event, Finished
from cluster.core import FinishReason, Usage

TOKENS = ((1, 2), (3, 4), (5,))
ANSWER = (1, 2, 3, 4, 5)


def committed(index: int, tokens: tuple[int, ...] | None = None, steps: int = 4) -> Committed:
    return Committed(index, f"text {index}", TOKENS[index] if tokens is None else tokens, steps, 0.1)


def finished() -> Finished:
    return Finished(FinishReason.EOS, Usage(), "r0")


def heard(*events: Event, from_canvas: int = 0, into: Transcript | None = None) -> Transcript:
    transcript = Transcript("job-1") if into is None else into
    hearing = Hearing(transcript, from_canvas)
    for at_s, event in enumerate(events):
        hearing.hear(event, float(at_s))
    return transcript


def whole() -> Transcript:
    return heard(Accepted("job-1", 3, "tiny", 7, False), committed(0), committed(1), committed(2), finished())


GOOD = Ending("succeeded", ANSWER, attempts=2)


def test_the_same_answer_is_neither_lost_nor_different() -> None:
    assert not judge(whole(), whole(), GOOD).lines()


def test_a_reader_that_disconnects_and_goes_on_at_its_offset_got_everything_once() -> None:
    transcript = heard(committed(0), committed(1))
    heard(committed(2), finished(), from_canvas=2, into=transcript)
    assert not judge(whole(), transcript, GOOD).lines()


def test_a_reader_that_joins_again_from_the_start_may_get_all_canvases_again() -> None:
    transcript = heard(committed(0), committed(1))
    heard(committed(0), committed(1), committed(2), finished(), into=transcript)
    assert not judge(whole(), transcript, GOOD).lines()


@pytest.mark.parametrize("indexes", [(0, 0, 1, 2), (0, 1, 0, 2), (0, 2, 1), (1, 0, 2)])
def test_a_canvas_twice_or_out_of_order_in_one_call_is_a_duplicate(indexes: tuple[int, ...]) -> None:
    transcript = heard(*(committed(index) for index in indexes), finished())
    verdict = judge(whole(), transcript, GOOD)
    assert verdict.duplicated
    assert not verdict.lost
    assert all("canvas" in line for line in verdict.lines())


def test_a_gap_is_seen_as_a_canvas_that_came_too_early() -> None:
    verdict = judge(whole(), heard(committed(0), committed(2), finished()), GOOD)
    assert "canvas 2 came too early, canvas 1 was next" in verdict.duplicated[0]
    assert "canvases [1] of the expected answer never came" in verdict.different[0]


def test_a_stream_that_ends_well_before_the_last_canvas_differs() -> None:
    assert judge(whole(), heard(committed(0), finished()), GOOD).different


def test_one_other_token_is_a_different_answer_and_is_named() -> None:
    storm = heard(committed(0), committed(1, (3, 9)), committed(2), finished())
    lines = judge(whole(), storm, GOOD).lines()
    assert lines == ["job-1: different: canvas 1 differs in token_ids: (3, 9), expected (3, 4)"]


def test_another_number_of_denoising_steps_is_different_although_the_tokens_are_equal() -> None:
    storm = heard(committed(0, steps=5), committed(1), committed(2), finished())
    assert "denoising_steps: 5, expected 4" in judge(whole(), storm, GOOD).different[0]


def test_a_canvas_beyond_the_expected_end_is_different() -> None:
    storm = heard(committed(0), committed(1), committed(2), Committed(3, "", (), 1, 0.0), finished())
    assert "canvas 3 is beyond the end" in judge(whole(), storm, GOOD).different[0]


def test_what_the_cluster_keeps_is_compared_too() -> None:
    verdict = judge(whole(), whole(), Ending("succeeded", (1, 2, 3, 4, 6)))
    assert verdict.different == ["the stored answer is not the expected one"]


def test_an_answer_in_one_piece_is_compared_with_all_canvases() -> None:
    transcript = Transcript("job-1")
    transcript.answer(Answer("job-1", "", ANSWER, FinishReason.EOS, Usage(), "tiny", "r0", 7))
    assert not judge(whole(), transcript, GOOD).lines()
    transcript.whole = ANSWER[:-1]
    assert "whole answer has 4 tokens" in judge(whole(), transcript, GOOD).different[0]


def test_a_job_that_failed_is_lost_and_its_history_is_told() -> None:
    notes = ("ATTEMPTS_EXHAUSTED: it was lost 3 times", "attempt 1 on r0: REPLICA_LOST: the stream broke")
    verdict = judge(whole(), heard(committed(0)), Ending("failed", (1, 2), notes=notes))
    assert verdict.lost == ["it is failed", *notes]


@pytest.mark.parametrize("state", ["missing", "queued", "running", "cancelled"])
def test_a_job_that_did_not_end_or_was_cancelled_by_nobody_is_lost(state: str) -> None:
    assert judge(whole(), whole(), Ending(state)).lost
    assert MISSING.state == "missing"


def test_a_job_that_succeeded_without_its_reader_hearing_of_it_is_lost() -> None:
    transcript = heard(committed(0))
    transcript.problem = "gave up"
    assert "gave up" in judge(whole(), transcript, GOOD).lost[0]


@pytest.mark.parametrize("tokens", [(), (1, 2), (1, 2, 3, 4), ANSWER])
def test_a_cancelled_job_keeps_a_prefix_of_whole_canvases(tokens: tuple[int, ...]) -> None:
    transcript = heard(committed(0))
    transcript.asked_to_stop = True
    assert not judge(whole(), transcript, Ending("cancelled", tokens)).lines()


@pytest.mark.parametrize("tokens", [(1,), (1, 2, 3), (3, 4)])
def test_a_cancelled_job_that_keeps_half_a_canvas_or_another_one_is_different(tokens: tuple[int, ...]) -> None:
    transcript = heard(committed(0))
    transcript.asked_to_stop = True
    assert judge(whole(), transcript, Ending("cancelled", tokens)).different


def test_steps_of_the_same_canvas_that_are_seen_again_are_redone() -> None:
    steps = [Seen(0.1 * at, "r", canvas, step) for at, (canvas, step) in enumerate([(0, 1), (0, 2), (0, 1), (1, 1)])]
    assert redone_steps(steps) == 1
    assert redone_steps([]) == 0


def test_redone_steps_are_found_across_the_calls_of_a_job() -> None:
    draft = Draft(0, 1, "", 0.5, 1, "r0")
    transcript = heard(draft)
    heard(draft, Draft(0, 2, "", 0.5, 1, "r1"), into=transcript)
    assert transcript.redone_steps == 1
    assert transcript.canvases == []


def kill(kind: KillKind = KillKind.REPLICA, *, at_s: float = 1.0) -> Kill:
    return Kill(kind, at_s, "r0", "r0", had_room=True)


def timeline(*steps: tuple[float, str]) -> list[Seen]:
    return [Seen(at_s, replica, 0, number) for number, (at_s, replica) in enumerate(steps, 1)]


def test_the_time_to_the_next_step_counts_from_the_kill_to_another_replica() -> None:
    # The step at 1.01 was on its way when its replica was killed.
    found = list(recoveries([kill()], [timeline((0.9, "r0"), (1.01, "r0"), (1.25, "r1"), (1.3, "r1"))]))
    assert [recovery.ms for recovery in found] == [pytest.approx(250)]
    assert found[0].is_clean


def test_a_canvas_counts_as_the_next_step_once_it_cannot_be_from_the_killed_replica() -> None:
    canvas = timeline((0.9, "r0"), (1.1, ""), (1.7, ""), (1.9, "r1"))
    assert [recovery.ms for recovery in recoveries([kill()], [canvas])] == [pytest.approx(700)]


def test_a_time_that_holds_another_strike_or_a_wait_for_a_slot_is_not_clean() -> None:
    hit = timeline((0.9, "r0"), (1.25, "r1"))
    assert not next(recoveries([kill(), kill(KillKind.ROUTER, at_s=1.2)], [hit])).is_clean
    assert next(recoveries([kill(), kill(KillKind.ROUTER, at_s=1.3)], [hit])).is_clean
    assert not next(recoveries([kill()], [hit], [1.1])).is_clean
    assert next(recoveries([kill()], [hit], [0.9, 1.3])).is_clean
    assert not next(recoveries([Kill(KillKind.REPLICA, 1.0, "r0", "r0", had_room=False)], [hit])).is_clean


@pytest.mark.parametrize(
    "steps",
    [
        (),
        ((0.5, "r1"), (1.2, "r1")),
        ((1.2, "r1"),),
        ((0.9, "r0"),),
        ((0.5, "r0"), (0.9, "r1"), (1.2, "r2")),
    ],
)
def test_streams_that_the_kill_did_not_hit_or_that_had_ended_are_not_counted(
    steps: tuple[tuple[float, str], ...],
) -> None:
    assert not list(recoveries([kill()], [timeline(*steps)]))


def test_only_kills_that_end_a_replica_at_once_are_timed() -> None:
    hit = timeline((0.9, "r0"), (1.25, "r1"))
    assert not list(recoveries([kill(KillKind.FREEZE), kill(KillKind.DRAIN), kill(KillKind.ROUTER)], [hit]))


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([], 0.5) is None


def test_a_transcript_keeps_what_it_heard() -> None:
    assert heard(committed(0)).canvases == [Heard(0, (1, 2), "text 0", 4)]
