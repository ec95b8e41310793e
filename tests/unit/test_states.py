"""The table of moves."""

from __future__ import annotations

import pytest

from cluster.errors import TransitionError
from cluster.jobs.states import TRANSITIONS, Action, AttemptEnd, JobState, next_state


def test_every_move_of_the_table_is_answered_with_its_state() -> None:
    assert {pair: next_state(*pair) for pair in TRANSITIONS} == dict(TRANSITIONS)


def test_every_other_move_is_refused_and_names_state_and_action() -> None:
    others = [(s, a) for s in (None, *JobState) for a in Action if (s, a) not in TRANSITIONS]
    for state, action in others:
        with pytest.raises(TransitionError, match=f"{state.value if state else 'unknown'}.*{action}"):
            next_state(state, action)


def test_nothing_leaves_a_terminal_state() -> None:
    assert {state for state in JobState if state.terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }
    assert not [state for state, _ in TRANSITIONS if state is not None and state.terminal]


def test_release_and_reap_give_a_running_job_back_to_the_queue() -> None:
    assert next_state(JobState.RUNNING, Action.release) is JobState.QUEUED
    assert next_state(JobState.RUNNING, Action.reap) is JobState.QUEUED


def test_what_others_did_to_a_run_is_no_loss() -> None:
    forgiven = {AttemptEnd.PREEMPTED, AttemptEnd.DRAINED, AttemptEnd.ROUTER_LOST}
    assert {end for end in AttemptEnd if not end.is_loss} == forgiven
