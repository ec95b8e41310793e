"""Conversion keeps everything, both ways."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import (
    MAX_SEED,
    Canvas,
    Draft,
    FinishReason,
    Image,
    JobSpec,
    Priority,
    ReplicaRow,
    SamplingParams,
    Usage,
)
from cluster.jobs.states import JobState
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2
from cluster.rpc.easel.v1 import generation_pb2, jobs_pb2
from cluster.rpc.results import Accepted, Committed, Finished, assemble, event_from_proto
from cluster.rpc.results import Draft as DraftEvent

counts = st.integers(0, 2**31 - 1)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
reals = st.floats(allow_nan=False)
texts = st.text(max_size=20)
samplings = st.builds(SamplingParams, st.integers(0, MAX_SEED), counts, counts, reals, reals, reals, reals, counts)
specs = st.builds(
    JobSpec,
    texts,
    tokens,
    samplings,
    st.lists(texts, max_size=3).map(tuple),
    st.sampled_from(Priority),
    texts,
    st.booleans(),
    counts,
)
images = st.lists(st.builds(Image, st.binary(max_size=20), texts), max_size=3).map(tuple)
canvases = st.builds(Canvas, counts, tokens, tokens, texts, counts, reals)
drafts = st.builds(Draft, counts, counts, texts, reals, counts)
usages = st.builds(Usage, *[counts] * 6, *[st.integers(0, 2**63 - 1)] * 2)


@given(specs)
def test_a_job_spec_comes_back_whole(spec: JobSpec) -> None:
    data = convert.job_spec_to_proto(spec).SerializeToString()
    assert convert.job_spec_from_proto(denoiser_pb2.JobSpec.FromString(data)) == spec


@given(images)
def test_images_come_back_whole(kept: tuple[Image, ...]) -> None:
    assert convert.images_from_bytes(convert.images_to_bytes(kept)) == kept


@given(canvases)
def test_a_canvas_comes_back_whole(canvas: Canvas) -> None:
    data = convert.canvas_to_proto(canvas).SerializeToString()
    assert convert.canvas_from_proto(denoiser_pb2.CommittedCanvas.FromString(data)) == canvas


@given(drafts)
def test_a_draft_comes_back_whole(draft: Draft) -> None:
    assert convert.draft_from_proto(convert.draft_to_proto(draft)) == draft


@given(usages)
def test_usage_comes_back_whole(usage: Usage) -> None:
    assert convert.usage_from_proto(convert.usage_to_proto(usage)) == usage


@pytest.mark.parametrize("draining", [False, True])
def test_a_replica_comes_back_whole(draining: bool) -> None:
    row = ReplicaRow("r", "h:1", "m", "v", 8, 3, 4000, {"steps": 1.5}, draining)
    assert convert.replica_from_proto(convert.replica_to_proto(row)) == row


def test_enums_of_the_contract_and_of_the_domain_match() -> None:
    for reason in FinishReason:
        assert convert.finish_reason_from_proto(convert.finish_reason_to_proto(reason)) is reason
    for priority in Priority:
        assert convert.priority_to_proto(priority) == priority.value
        assert convert.priority_from_proto(convert.priority_to_proto(priority)) is priority
    for state in JobState:
        assert convert.job_state_from_proto(convert.job_state_to_proto(state.value)) == state.value
    assert len(generation_pb2.FinishReason.values()) == len(FinishReason) + 1
    assert len(generation_pb2.Priority.values()) == len(Priority) + 1
    assert len(jobs_pb2.JobState.values()) == len(JobState) + 1


def test_what_is_unspecified_has_no_domain_value_but_a_normal_priority() -> None:
    assert convert.finish_reason_from_proto(generation_pb2.FINISH_REASON_UNSPECIFIED) is None
    assert convert.finish_reason_to_proto(None) == generation_pb2.FINISH_REASON_UNSPECIFIED
    assert convert.job_state_from_proto(jobs_pb2.JOB_STATE_UNSPECIFIED) is None
    assert convert.priority_from_proto(generation_pb2.PRIORITY_UNSPECIFIED) is Priority.NORMAL


def test_an_unknown_state_word_is_refused() -> None:
    with pytest.raises(ValueError, match="JOB_STATE_LOST"):
        convert.job_state_to_proto("lost")


def test_a_moment_keeps_its_milliseconds() -> None:
    moment = convert.timestamp_from_proto(convert.timestamp_to_proto(1_700_000_000_123))
    assert moment == datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC)


def test_events_reach_a_client_as_they_were_sent() -> None:
    usage = Usage(5, 6, 2, 7, 1, 0, 3, 40)
    sent = [
        convert.accepted_event("j", 5, "m", MAX_SEED, joined=True),
        convert.draft_event(Draft(0, 1, "?", 0.5, 3), "r0"),
        convert.committed_event(Canvas(0, (9, 9), (9,), "a", 4, 0.1)),
        convert.finished_event(FinishReason.STOP, usage, "r1"),
    ]
    events = [event for event in map(event_from_proto, sent) if event is not None]
    assert events == [
        Accepted("j", 5, "m", MAX_SEED, True),
        DraftEvent(0, 1, "?", 0.5, 3, "r0"),
        Committed(0, "a", (9,), 4, 0.1),
        Finished(FinishReason.STOP, usage, "r1"),
    ]
    answer = assemble(events)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", (9,), FinishReason.STOP)
    with pytest.raises(ValueError, match="not whole"):
        assemble(events[:-1])


def test_an_event_of_a_newer_router_is_no_event() -> None:
    assert event_from_proto(generation_pb2.GenerateEvent()) is None
