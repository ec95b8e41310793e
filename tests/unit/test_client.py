"""The client against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from cluster.client import Accepted, Committed, Draft, EaselClient, Event, Finished, JobAttempt
from cluster.core import FinishReason, Image, Priority
from cluster.errors import (
    DeadlineExceeded,
    EaselError,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    ReplicaNotFound,
    TransitionError,
    Unavailable,
)
from cluster.routers import backoff_s
from cluster.rpc import convert
from cluster.rpc.easel.v1 import jobs_pb2
from cluster.rpc.prompts import MAX_FILE_BYTES
from cluster.rpc.results import assemble
from tests.unit.fake_router import IMAGE_TOKEN, MAX_REQUEST_BYTES, USAGE, FakeRouter, serve
from tests.unit.images import picture


@pytest_asyncio.fixture
async def router() -> FakeRouter:
    return FakeRouter()


@pytest_asyncio.fixture
async def client(router: FakeRouter) -> AsyncIterator[EaselClient]:
    async with serve(router) as address, EaselClient(address) as opened:
        yield opened


async def read(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def test_generate_returns_the_whole_answer(client: EaselClient) -> None:
    answer = await client.generate("hello", seed=7)
    assert (answer.text, answer.seed, answer.replica, answer.model) == ("olleh", 7, "r0", "characters")
    assert answer.finish_reason is FinishReason.EOS
    assert answer.usage == USAGE
    assert answer.token_ids == tuple(ord(c) for c in "olleh")


async def test_a_stream_has_accepted_drafts_canvases_and_finished_in_order(client: EaselClient) -> None:
    events = await read(client.stream("hello", drafts=True))
    assert [type(e) for e in events] == [Accepted, Draft, Committed, Draft, Committed, Finished]
    assert assemble(events).text == "olleh"


async def test_a_stream_without_drafts_has_none(client: EaselClient) -> None:
    assert not [e for e in await read(client.stream("hello")) if isinstance(e, Draft)]


async def test_a_conversation_and_token_ids_are_prompts_too(client: EaselClient, router: FakeRouter) -> None:
    await client.generate([("system", "a"), {"role": "user", "content": "b"}], request_id="chat")
    await client.generate(tokens=[65, 66], request_id="tokens")
    assert router.parsed["chat"].spec.prompt_tokens == (2, 97, 98)
    assert router.parsed["tokens"].spec.prompt_tokens == (65, 66)


async def test_content_may_be_texts_images_and_files_of_images(
    client: EaselClient, router: FakeRouter, tmp_path: Path
) -> None:
    png, jpeg = picture("PNG"), picture("JPEG")
    (tmp_path / "photo.jpg").write_bytes(jpeg)
    await client.generate([{"role": "user", "content": ["a", png, tmp_path / "photo.jpg", "b"]}], request_id="seen")
    assert router.parsed["seen"].images == (Image(png, "image/png"), Image(jpeg, "image/jpeg"))
    assert router.parsed["seen"].spec.prompt_tokens == (2, 97, IMAGE_TOKEN, IMAGE_TOKEN, 98)


async def test_a_file_that_cannot_be_sent_is_named(client: EaselClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.parts\[1\]\.image: is '.*'; No such file"):
        await client.generate([("user", ["a", tmp_path / "no.png"])])
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidRequest, match="of 67108865 bytes; at most 67108864 can be sent"):
        await client.generate([("user", [tmp_path / "huge.png"])])


async def test_content_of_another_type_is_a_type_error(client: EaselClient) -> None:
    with pytest.raises(TypeError, match=r"messages\[0\]\.parts\[0\] is dict; allowed are str, bytes and paths"):
        await client.generate([("user", [{"type": "text"}])])  # type: ignore[list-item]


async def test_every_option_reaches_the_router(client: EaselClient, router: FakeRouter) -> None:
    await client.generate(
        "x",
        request_id="all",
        seed=2**64 - 1,
        max_new_tokens=9,
        max_denoising_steps=5,
        entropy_bound=0.5,
        t_min=0.1,
        t_max=0.2,
        confidence_threshold=0.3,
        stability_threshold=4,
        stop=["end"],
        priority=Priority.HIGH,
        tenant="shop",
        timeout_s=2.5,
    )
    parsed = router.parsed["all"]
    sampling = parsed.spec.sampling
    assert (sampling.seed, sampling.max_new_tokens, sampling.max_denoising_steps) == (2**64 - 1, 9, 5)
    assert (sampling.entropy_bound, sampling.t_min, sampling.t_max) == (0.5, 0.1, 0.2)
    assert (sampling.confidence_threshold, sampling.stability_threshold) == (0.3, 4)
    assert (parsed.spec.stop, parsed.spec.priority, parsed.spec.tenant) == (("end",), Priority.HIGH, "shop")
    assert parsed.timeout_ms == 2500


async def test_an_unknown_option_is_named(client: EaselClient) -> None:
    with pytest.raises(TypeError, match="unknown option 'temperature'"):
        await client.generate("x", temperature=1.0)  # type: ignore[call-arg]  # the point of the test


async def test_a_bad_request_names_all_its_fields(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.generate("", max_new_tokens=0, t_min=float("nan"))
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["text", "sampling.t_min", "sampling.max_new_tokens"]


async def test_submit_names_fields_below_request(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest, match=r"request\.tenant: is 129 characters long"):
        await client.submit("x", tenant="t" * 129)


async def test_numbers_that_the_wire_cannot_carry_are_refused_by_name(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.max_new_tokens: is 10000000000; out of"):
        await client.generate("x", max_new_tokens=10**10)
    with pytest.raises(InvalidRequest, match=r"text: is .*; text must be valid Unicode"):
        await client.generate("\ud800")
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.role: is 'tool'; allowed are system"):
        await client.generate([("tool", "x")])


async def test_a_request_that_is_too_large_is_an_invalid_request(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest, match=f"request: is .* bytes; at most {MAX_REQUEST_BYTES} bytes"):
        await client.generate("x" * 10_000_000)


async def test_a_request_above_the_hard_limit_is_an_invalid_request_too(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest, match="request: is too large for the server"):
        await client.generate("x" * 20_000_000)


async def test_a_bug_in_a_handler_shows_an_id_and_no_secret(
    client: EaselClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(EaselError, match="an unexpected error") as caught:
        await client.generate("!bug")
    assert "secret" not in str(caught.value)
    records = [record for record in caplog.records if record.name == "cluster.rpc.interceptors"]
    assert len(records) == 1
    assert records[0].exc_info is not None
    error_id = str(caught.value).split("error, ")[1].split()[0]
    assert error_id in records[0].getMessage()


async def test_an_error_in_the_middle_of_a_stream_keeps_its_type(client: EaselClient) -> None:
    with pytest.raises(JobCancelled, match="job x was cancelled"):
        await read(client.stream("!cancelled"))


async def test_retry_after_comes_through(client: EaselClient) -> None:
    with pytest.raises(EaselError, match="a plain error") as caught:
        await client.generate("!full")
    assert caught.value.retry_after_ms == 250


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_unavailable_router_is_tried_again_with_the_same_id(
    client: EaselClient, router: FakeRouter, streamed: bool
) -> None:
    router.unavailable_calls = 3
    answer = assemble(await read(client.stream("ab"))) if streamed else await client.generate("ab")
    assert answer.text == "ba"
    assert len(router.calls) == 4
    assert list(router.parsed) == [answer.job_id]


async def test_a_router_that_is_there_is_waited_for_though_it_never_served(
    client: EaselClient, router: FakeRouter
) -> None:
    router.unavailable_calls = 10
    assert (await client.generate("ab")).text == "ba"
    assert len(router.calls) == 11


async def test_an_invalid_request_is_not_repeated(client: EaselClient, router: FakeRouter) -> None:
    with pytest.raises(InvalidRequest):
        await client.generate(" ")
    assert len(router.calls) == 1


async def test_a_watch_that_breaks_goes_on_after_the_last_canvas(client: EaselClient, router: FakeRouter) -> None:
    job = await client.submit("hello")
    router.breaks_after = [0]
    events = await read(client.watch(job.job_id))
    assert [e.canvas_index for e in events if isinstance(e, Committed)] == [0, 1]
    assert sum(isinstance(e, Accepted) for e in events) == 1
    assert router.calls == ["Submit", "Watch 0", "Watch 1"]


async def test_a_watch_starts_where_it_is_told(client: EaselClient) -> None:
    job = await client.submit("hello")
    events = await read(client.watch(job.job_id, from_canvas=1, drafts=True))
    assert [e.canvas_index for e in events if isinstance(e, Committed | Draft)] == [1, 1]
    with pytest.raises(InvalidRequest, match="from_canvas: is -1"):
        await read(client.watch(job.job_id, from_canvas=-1))


async def test_leaving_a_stream_ends_the_call(client: EaselClient, router: FakeRouter) -> None:
    async with aclosing(client.stream("!hang")) as events:
        async for event in events:
            assert isinstance(event, Accepted)
            break
    await asyncio.wait_for(router.left.wait(), 5)


async def test_cancelling_a_task_ends_its_call(client: EaselClient, router: FakeRouter) -> None:
    task = asyncio.create_task(client.generate("!hang"))
    await asyncio.wait_for(router.hanging.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(router.left.wait(), 5)


async def test_a_hanging_router_meets_the_deadline(client: EaselClient) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.generate("!hang", timeout_s=0.05)


async def test_get_cancel_and_jobs_return_views(client: EaselClient, router: FakeRouter) -> None:
    for name in ("a", "b", "c"):
        await client.submit("hello", request_id=name)
    view = await client.get("a")
    assert (view.state, view.text, view.finish_reason) == ("succeeded", "olleh", FinishReason.EOS)
    assert view.created_at.timestamp() == pytest.approx(1_700_000_000.123)
    assert view.finished_at is None
    assert view.problem is None
    assert (await client.cancel("b")).state == "cancelled"
    assert [job.job_id async for job in client.jobs()] == ["a", "b", "c"]
    with pytest.raises(JobNotFound, match="'nope'"):
        await client.get("nope")


async def test_a_job_that_has_ended_cannot_be_cancelled(client: EaselClient, router: FakeRouter) -> None:
    await client.submit("hello", request_id="a")
    router.ended.add("a")
    with pytest.raises(TransitionError, match="job a cannot be cancelled: it has succeeded already"):
        await client.cancel("a")
    assert len(router.cancelled) == 0


async def test_an_offset_that_no_job_can_have_is_refused_by_name(client: EaselClient) -> None:
    await client.submit("hello", request_id="a")
    with pytest.raises(
        InvalidRequest, match=r"from_canvas: is 3; allowed is 0 to 2: the job has ended with 2 canvases"
    ):
        await read(client.watch("a", from_canvas=3))
    assert [type(event) for event in await read(client.watch("a", from_canvas=2))] == [Accepted, Finished]
    with pytest.raises(InvalidRequest, match=f"from_canvas: is {2**31}; allowed is 0 to {2**31 - 1}"):
        client.watch("a", from_canvas=2**31)


async def test_an_id_that_is_no_text_is_refused_by_name(client: EaselClient) -> None:
    with pytest.raises(InvalidRequest, match=r"job_id: is .*; text must be valid Unicode"):
        await client.get("\ud800")
    with pytest.raises(InvalidRequest, match=r"replica: is .*; text must be valid Unicode"):
        await client.drain("\ud800")


async def test_a_drain_says_how_many_jobs_move_and_shows_in_the_status(client: EaselClient) -> None:
    assert [row.draining for row in (await client.status()).replicas] == [False]
    assert await client.drain("r0") == 3
    assert [row.draining for row in (await client.status()).replicas] == [True]
    with pytest.raises(ReplicaNotFound, match="r1"):
        await client.drain("r1")
    with pytest.raises(InvalidRequest, match="replica: is 'r 0'"):
        await client.drain("r 0")


async def test_a_job_carries_the_attempts_that_ended_early(client: EaselClient, router: FakeRouter) -> None:
    attempt = jobs_pb2.JobAttempt(replica="r1", reason="DRAINED", message="r1 leaves", epoch=4)
    attempt.started_at.CopyFrom(convert.timestamp_to_proto(1000))
    attempt.ended_at.CopyFrom(convert.timestamp_to_proto(2500))
    router.history.append(attempt)
    job = await client.submit("hello")
    moments = [datetime.fromtimestamp(s, UTC) for s in (1, 2.5)]
    assert job.history == (JobAttempt(4, "r1", "DRAINED", "r1 leaves", *moments),)
    assert job.losses == 1


async def test_status_shows_replicas_and_the_queue(client: EaselClient) -> None:
    view = await client.status()
    assert (view.slots, view.active, view.queued, view.queue_limit) == (8, 3, 1, 1000)
    assert view.replicas[0].stats == {"denoising_steps": 12.0}


async def test_wait_ready_returns_when_the_health_service_says_so(client: EaselClient) -> None:
    await client.wait_ready(5)


async def test_nobody_at_the_address_is_said_plainly() -> None:
    async with EaselClient("127.0.0.1:1", retries=1) as client:
        with pytest.raises(Unavailable, match=r"^no cluster answers at 127\.0\.0\.1:1$"):
            await client.generate("x")
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 is not ready after 0\.2 s: no cluster answers"):
            await client.wait_ready(0.2)


def test_the_client_needs_neither_ray_nor_torch() -> None:
    heavy = "sorted({'ray', 'torch', 'redis', 'numpy', 'deployments'} & set(sys.modules))"
    code = f"import sys, cluster.client; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_back_off_grows_and_follows_the_server() -> None:
    assert [backoff_s(attempt, None, 0.0) for attempt in range(3)] == [0.05, 0.1, 0.2]
    assert backoff_s(0, None, 1.0) == pytest.approx(0.1)
    assert backoff_s(20, None, 0.0) == 2.5
    assert backoff_s(0, 400, 0.0) == 0.4


@pytest.mark.parametrize(
    ("data", "field", "text"),
    [
        (b"\x12\x03a\xff\xfe", "text", "is not UTF-8: byte 0xff at offset 1"),
        (b"\x1a\x07\x08\x02\x12\x03a\xc3\x28", "messages[0].content", "byte 0xc3 at offset 1"),
        (b"\x12\x30abc", "request", "cannot be parsed as easel.v1.GenerateRequest"),
    ],
)
async def test_bytes_that_are_no_request_are_an_invalid_argument(
    router: FakeRouter, data: bytes, field: str, text: str
) -> None:
    from cluster.rpc.status import error_from_rpc

    async with serve(router) as address, grpc.aio.insecure_channel(address) as channel:
        # Without serialisers bytes go out as they are, which the type stubs do not know.
        unary: Any = channel.unary_unary("/easel.v1.Generation/Generate")
        stream: Any = channel.unary_stream("/easel.v1.Generation/StreamGenerate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidRequest)
        assert [violation.field for violation in error.violations] == [field]
        assert text in error.violations[0].description
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream(data):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
