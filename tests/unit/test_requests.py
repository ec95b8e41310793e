"""What a request may be, checked before any compute."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import Priority, Turn, Violation
from cluster.errors import InvalidRequest
from cluster.rpc.easel.v1 import generation_pb2, jobs_pb2
from cluster.rpc.requests import (
    MAX_TIMEOUT_MS,
    ListQuery,
    ParsedRequest,
    check_from_canvas,
    check_job_id,
    check_within_job,
    digest_of,
    parse_generate,
    parse_list,
    under,
)
from tests.unit.fake_router import CARD, Characters

Request = generation_pb2.GenerateRequest
NAN, INF = float("nan"), float("inf")


def parse(request: Request, deadline_ms: int | None = None) -> ParsedRequest:
    return parse_generate(
        request, CARD, Characters(), deadline_ms=deadline_ms, new_id=lambda: "made", new_seed=lambda: 9
    )


def violations(request: Request) -> list[Violation]:
    with pytest.raises(InvalidRequest) as caught:
        parse(request)
    return list(caught.value.violations)


def fields(request: Request) -> list[str]:
    return [violation.field for violation in violations(request)]


def sampled(**values: Any) -> Request:  # noqa: ANN401 - also values of wrong ranges
    return Request(text="hi", sampling=generation_pb2.SamplingParams(**values))


def chat(*turns: tuple[int, str]) -> Request:
    messages = []
    for role, content in turns:
        message = generation_pb2.ChatMessage(content=content)
        message.role = role  # type: ignore[assignment]  # numbers that are no Role are the point of some tests
        messages.append(message)
    return Request(messages=messages)


def test_what_is_left_out_comes_from_the_model() -> None:
    parsed = parse(Request(text="hi"))
    assert parsed.job_id == "made"
    assert parsed.spec.job_id == "made"
    assert parsed.spec.sampling == dataclasses.replace(CARD.defaults, seed=9)
    assert parsed.spec.prompt_tokens == (2, 104, 105)
    assert (parsed.spec.priority, parsed.spec.tenant, parsed.spec.stop) == (Priority.NORMAL, "", ())
    assert (parsed.timeout_ms, parsed.spec.wants_drafts) == (None, False)


def test_text_is_one_message_of_the_user() -> None:
    seen: list[Sequence[Turn]] = []

    class Recorder:
        def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
            seen.append(messages)
            return [1]

    parse_generate(Request(text="hi"), CARD, Recorder(), deadline_ms=None, new_id=lambda: "j", new_seed=lambda: 1)
    assert seen == [[("user", "hi")]]


def test_a_seed_of_zero_is_a_seed() -> None:
    assert parse(sampled(seed=0)).spec.sampling.seed == 0


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_text_is_refused(text: str) -> None:
    assert fields(Request(text=text)) == ["text"]


def test_a_prompt_in_no_form_or_in_two_is_refused() -> None:
    assert violations(Request()) == [
        Violation(
            "text",
            "is not set, nor are messages and token_ids; exactly one of text, messages and token_ids must be set",
        )
    ]
    both = chat((2, "a"))
    both.text = "b"
    assert fields(both) == ["messages"]
    assert "as well as text" in violations(both)[0].description
    assert fields(Request(text="", token_ids=[1])) == ["token_ids"]


def test_messages_need_a_known_role_and_content() -> None:
    found = violations(chat((2, "a"), (0, "b"), (77, "c"), (3, " ")))
    assert [v.field for v in found] == ["messages[1].role", "messages[2].role", "messages[3].content"]
    assert "is ROLE_UNSPECIFIED; allowed are ROLE_SYSTEM" in found[0].description
    assert "is 77;" in found[1].description


def test_a_chat_that_the_template_refuses_says_why() -> None:
    found = violations(chat((2, "a"), (2, "b")))
    assert found == [Violation("messages", "the model's chat template refuses it: roles must alternate")]


def test_token_ids_lie_in_the_vocabulary() -> None:
    found = violations(Request(token_ids=[0, 127, 128, -1]))
    assert [v.field for v in found] == ["token_ids[2]", "token_ids[3]"]
    assert found[0].description == "is 128; the model's vocabulary is 0 to 127"
    assert parse(Request(token_ids=[0, 127])).spec.prompt_tokens == (0, 127)


def test_a_million_bad_tokens_are_told_briefly() -> None:
    found = violations(Request(token_ids=[500] * 1_000_000))
    assert len(found) == 9
    assert found[-1] == Violation("token_ids", "999992 more values are wrong")


def test_a_prompt_leaves_room_for_a_canvas() -> None:
    assert parse(Request(token_ids=[5] * 248)).spec.sampling.max_new_tokens == 8
    found = violations(Request(token_ids=[5] * 249))
    assert found[0].field == "token_ids"
    assert found[0].description == (
        "is 249 tokens long; at most 248 fit, for the context holds 256 and one canvas of 8 must have room"
    )
    assert fields(Request(text="x" * 248)) == ["text"]


def test_the_models_own_length_is_cut_to_the_room_in_whole_canvases() -> None:
    assert parse(Request(token_ids=[5] * 230)).spec.sampling.max_new_tokens == 24
    assert parse(Request(token_ids=[5] * 100)).spec.sampling.max_new_tokens == 32


def test_a_callers_length_is_refused_when_it_does_not_fit() -> None:
    request = Request(token_ids=[5] * 230)
    request.sampling.max_new_tokens = 25
    assert violations(request) == [
        Violation(
            "sampling.max_new_tokens",
            "is 25; allowed is 1 to 24: the context holds 256 tokens and the prompt has 230",
        )
    ]
    request.sampling.max_new_tokens = 24
    assert parse(request).spec.sampling.max_new_tokens == 24
    assert fields(sampled(max_new_tokens=0)) == ["sampling.max_new_tokens"]
    assert fields(sampled(max_new_tokens=-5)) == ["sampling.max_new_tokens"]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_denoising_steps", (1, 1000), (0, -1, 1001)),
        ("entropy_bound", (1e-9, 1000.0), (0.0, -1.0, 1000.1, NAN, INF, -INF)),
        ("t_min", (1e-9, 0.8), (0.0, -0.1, 100.1, NAN, INF)),
        ("t_max", (0.4, 100.0), (0.0, 0.39, 100.1, NAN, INF)),
        ("confidence_threshold", (1e-9, 1000.0), (0.0, 1000.1, NAN, INF)),
        ("stability_threshold", (0, 100), (-1, 101)),
    ],
)
def test_sampling_parameters_have_limits(name: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        assert getattr(parse(sampled(**{name: value})).spec.sampling, name) == value
    for value in bad:
        assert fields(sampled(**{name: value})) == [f"sampling.{name}"]


def test_crossed_temperatures_name_the_field_that_was_set() -> None:
    assert violations(sampled(t_min=0.9)) == [
        Violation(
            "sampling.t_min",
            "is 0.9; allowed is above 0 up to t_max, by the model's default 0.8: set t_max too",
        )
    ]
    assert violations(sampled(t_max=0.1)) == [Violation("sampling.t_max", "is 0.1; allowed is t_min, here 0.4, to 100")]
    assert fields(sampled(t_min=0.9, t_max=0.5)) == ["sampling.t_max"]
    assert parse(sampled(t_min=0.5, t_max=0.5)).spec.sampling.t_max == 0.5


def test_stop_strings_are_few_and_short() -> None:
    assert parse(sampled(stop=["a" * 256] * 16)).spec.stop == ("a" * 256,) * 16
    assert fields(sampled(stop=["a"] * 17)) == ["sampling.stop"]
    assert fields(sampled(stop=["a", "", "b" * 257])) == ["sampling.stop[1]", "sampling.stop[2]"]


def test_the_envelope_has_limits() -> None:
    for good in ("a", "A.b_c:d-9", "x" * 128):
        assert parse(Request(text="hi", request_id=good)).job_id == good
    for bad in ("a b", "ä", "x" * 129, "a\n", "a/b"):
        assert fields(Request(text="hi", request_id=bad)) == ["request_id"]
    assert fields(Request(text="hi", tenant="t" * 129)) == ["tenant"]
    request = Request(text="hi")
    request.priority = 9  # type: ignore[assignment]  # an unknown enum value, as an old or broken client sends
    assert violations(request) == [
        Violation("priority", "is 9; allowed are BATCH (1), NORMAL (2), HIGH (3), URGENT (4) and none")
    ]
    request.priority = generation_pb2.PRIORITY_URGENT
    assert parse(request).spec.priority is Priority.URGENT


@pytest.mark.parametrize(
    ("seconds", "nanos", "timeout_ms"),
    [(1, 0, 1000), (0, 1, 1), (0, 1_000_001, 2), (2, 500_000_000, 2500), (86_400, 0, MAX_TIMEOUT_MS)],
)
def test_a_timeout_is_rounded_up_to_milliseconds(seconds: int, nanos: int, timeout_ms: int) -> None:
    request = Request(text="hi", timeout=Duration(seconds=seconds, nanos=nanos))
    assert parse(request, deadline_ms=5).timeout_ms == timeout_ms


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(0, 0), (-1, 0), (0, -5), (1, -5), (86_400, 1), (2**62, 0), (0, 1_000_000_000)],
)
def test_a_timeout_has_limits(seconds: int, nanos: int) -> None:
    assert fields(Request(text="hi", timeout=Duration(seconds=seconds, nanos=nanos))) == ["timeout"]


def test_the_grpc_deadline_is_the_timeout_of_a_request_without_one() -> None:
    assert parse(Request(text="hi"), deadline_ms=1234).timeout_ms == 1234
    assert parse(Request(text="hi"), deadline_ms=0).timeout_ms == 1
    assert parse(Request(text="hi"), deadline_ms=10**12).timeout_ms == MAX_TIMEOUT_MS


def test_all_violations_come_at_once() -> None:
    request = Request(text="", request_id="?", tenant="t" * 200, timeout=Duration())
    request.sampling.t_min = 0
    request.sampling.stop.append("")
    assert fields(request) == ["text", "sampling.t_min", "request_id", "tenant", "sampling.stop[0]", "timeout"]


def test_long_values_are_shortened() -> None:
    found = violations(Request(text="hi", request_id="é" * 5000))
    assert len(found[0].description) < 200
    assert "5000 characters" in found[0].description


def test_the_digest_is_that_of_the_body() -> None:
    base = digest_of(Request(text="hi"))
    same = Request(text="hi", request_id="other", timeout=Duration(seconds=3), drafts=True)
    assert digest_of(same) == base
    assert len(base) == 64
    for other in (
        Request(text="ho"),
        Request(text="hi", tenant="t"),
        Request(text="hi", priority=generation_pb2.PRIORITY_HIGH),
        sampled(seed=1),
    ):
        assert digest_of(other) != base
    assert same.request_id == "other"
    assert parse(same).digest == base


@given(
    st.integers(0, 300),
    st.none() | st.integers(-(2**31), 2**31 - 1),
    st.none() | st.floats(),
    st.none() | st.floats(),
)
def test_what_passes_fits_the_model(
    prompt_tokens: int, max_new_tokens: int | None, t_min: float | None, t_max: float | None
) -> None:
    request = sampled(max_new_tokens=max_new_tokens, t_min=t_min, t_max=t_max)
    request.ClearField("text")
    request.token_ids.extend([5] * prompt_tokens)
    with contextlib.suppress(InvalidRequest):
        sampling = parse(request).spec.sampling
        new_tokens = CARD.canvases_for(sampling.max_new_tokens) * CARD.canvas_tokens
        assert 0 < prompt_tokens <= CARD.max_context_tokens - new_tokens
        assert 0 < sampling.t_min <= sampling.t_max <= 100


def test_under_names_the_field_around_a_request() -> None:
    with pytest.raises(InvalidRequest) as caught, under("request"):
        parse(Request())
    assert caught.value.violations[0].field == "request.text"


def test_job_ids_and_offsets_are_checked() -> None:
    assert check_job_id("job-1") == "job-1"
    for bad in ("", "a b", "x" * 129):
        with pytest.raises(InvalidRequest, match="job_id: is "):
            check_job_id(bad)
    assert check_from_canvas(0) == 0
    with pytest.raises(InvalidRequest, match="from_canvas: is -1; allowed is 0 and above"):
        check_from_canvas(-1)


def test_an_offset_is_within_what_the_job_has_or_can_have() -> None:
    assert check_within_job(2, 2, ended=True) == 2
    with pytest.raises(InvalidRequest, match="from_canvas: is 3; allowed is 0 to 2: the job has ended with 2 canvases"):
        check_within_job(3, 2, ended=True)
    with pytest.raises(InvalidRequest, match="from_canvas: is 9; allowed is 0 to 8: the job writes at most 8 canvases"):
        check_within_job(9, 8, ended=False)


def test_a_page_request_is_checked() -> None:
    assert parse_list(jobs_pb2.ListJobsRequest()) == ListQuery(50, "", None)
    full = jobs_pb2.ListJobsRequest(page_size=1000, page_token="t", state=jobs_pb2.JOB_STATE_RUNNING)
    assert parse_list(full) == ListQuery(1000, "t", "running")
    bad = jobs_pb2.ListJobsRequest(page_size=1001, page_token="t" * 300)
    bad.state = 42  # type: ignore[assignment]  # an unknown enum value
    with pytest.raises(InvalidRequest) as caught:
        parse_list(bad)
    assert [v.field for v in caught.value.violations] == ["page_size", "page_token", "state"]


def test_a_text_that_no_tokenizer_could_fit_is_refused_before_it_is_tokenized() -> None:
    class Unwanted:
        def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
            raise AssertionError("the tokenizer was asked")

    request = generation_pb2.GenerateRequest(text="x" * (64 * CARD.max_context_tokens + 1))
    with pytest.raises(InvalidRequest, match="characters long"):
        parse_generate(request, CARD, Unwanted(), deadline_ms=None, new_id=lambda: "id", new_seed=lambda: 1)
