"""The client when routers go: every canvas once, on any router that is left, and no job left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import pytest
import pytest_asyncio

from cluster.client import Accepted, Answer, Committed, Draft, EaselClient, Event, Finished
from cluster.errors import ConfigError, DeadlineExceeded, EaselError, JobNotFound, JobReleased, Unavailable
from cluster.routers import Routers
from cluster.rpc.results import assemble
from cluster.trust import Trust
from tests.unit.fake_router import USAGE, FakeRouter, serve

NOBODY = "127.0.0.1:1"
PATIENCE_S = 10


@dataclass
class Pair:
    """Two routers of one cluster, and a client that knows both and asks the first one."""

    first: FakeRouter
    second: FakeRouter
    client: EaselClient
    leave: AsyncExitStack

    async def lose_first(self) -> None:
        """End the first router's server as it stands, with all its calls."""
        await self.leave.aclose()


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    first = FakeRouter()
    second = FakeRouter(peer=first)
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(serve(second))
        leave = await stack.enter_async_context(AsyncExitStack())
        here = await leave.enter_async_context(serve(first))
        client = await stack.enter_async_context(EaselClient(f"{here}, {there}"))
        yield Pair(first, second, client, leave)


async def read(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def canvases(events: list[Event]) -> list[int]:
    return [event.canvas_index for event in events if isinstance(event, Committed)]


async def test_a_stream_that_breaks_goes_on_at_the_next_router_with_every_canvas_once(pair: Pair) -> None:
    pair.first.breaks_after = [0]
    events = await read(pair.client.stream("hello", request_id="a"))
    assert [type(event) for event in events] == [Accepted, Committed, Committed, Finished]
    answer = assemble(events)
    assert (answer.text, answer.usage, answer.replica, answer.seed) == ("olleh", USAGE, "r0", 9)
    assert (pair.first.calls, pair.second.calls) == (["StreamGenerate"], ["Watch 1"])


async def test_a_stream_that_breaks_before_its_end_asks_for_the_end_alone(pair: Pair) -> None:
    pair.first.breaks_after = [1]
    events = await read(pair.client.stream("hello"))
    assert canvases(events) == [0, 1]
    assert isinstance(events[-1], Finished)
    assert pair.second.calls == ["Watch 2"]


async def test_a_stream_goes_on_as_often_as_it_breaks(pair: Pair) -> None:
    pair.first.breaks_after, pair.second.breaks_after = [0, 1], [0, 1]
    assert canvases(await read(pair.client.stream("hello"))) == [0, 1]


async def test_a_stream_that_goes_on_still_has_drafts(pair: Pair) -> None:
    pair.first.breaks_after = [0]
    events = await read(pair.client.stream("hello", drafts=True))
    assert [event.canvas_index for event in events if isinstance(event, Draft)] == [0, 1]


async def test_a_job_that_was_released_is_never_shown_to_its_reader(pair: Pair) -> None:
    pair.first.breaks_after, pair.first.breaks_with = [0], JobReleased("job a goes on elsewhere")
    assert canvases(await read(pair.client.stream("hello"))) == [0, 1]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_router_that_is_lost_in_the_middle_of_a_call_is_replaced_by_another(pair: Pair, streamed: bool) -> None:
    pair.first.holds_after = 0

    async def ask() -> Answer:
        if streamed:
            return assemble(await read(pair.client.stream("hello", request_id="a")))
        return await pair.client.generate("hello", request_id="a")

    if not streamed:
        pair.first.holds_unary = True
    asking = asyncio.create_task(ask())
    await asyncio.wait_for(pair.first.hanging.wait(), PATIENCE_S)
    await pair.lose_first()
    answer = await asyncio.wait_for(asking, PATIENCE_S)
    assert (answer.job_id, answer.text) == ("a", "olleh")
    assert pair.second.calls == (["Watch 1"] if streamed else ["Generate"])
    assert pair.second.cancelled == []


async def test_the_first_of_several_targets_may_be_nobody(pair: Pair) -> None:
    await pair.lose_first()
    assert (await pair.client.generate("ab")).text == "ba"
    assert (await pair.client.status()).slots == 8


async def test_every_target_is_tried_before_the_client_gives_up(pair: Pair) -> None:
    async with serve(FakeRouter()) as address:
        target = ",".join([NOBODY] * 3 + [address])
        async with EaselClient(target, retries=0) as client:
            assert (await client.generate("ab")).text == "ba"
        async with EaselClient(target, retries=0) as client:
            await client.wait_ready(PATIENCE_S)


async def test_targets_that_are_all_nobody_are_named_together() -> None:
    async with EaselClient(f"{NOBODY},localhost:1", retries=1) as client:
        with pytest.raises(Unavailable, match=rf"^no cluster answers at {NOBODY},localhost:1$"):
            await client.status()


@pytest.mark.parametrize(
    ("target", "limits", "what"),
    [
        ("", {}, "target is ''"),
        (" , ", {}, "target is ' , '"),
        ("a:1", {"retries": -1}, "retries is -1"),
        ("a:1", {"patience_s": float("nan")}, "patience_s is nan"),
    ],
)
def test_a_client_of_nothing_or_with_bad_limits_is_refused(target: str, limits: dict[str, float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        EaselClient(target, **limits)  # type: ignore[arg-type]  # the point of the test


async def test_two_tasks_that_lose_a_router_at_once_leave_it_once() -> None:
    routers = Routers("a:1,b:1,c:1", retries=0, patience_s=0, trust=Trust())
    routers.leave(0)
    routers.leave(1)
    routers.leave(0)
    assert routers.current == 2
    routers.leave(2)
    assert routers.current == 0


async def test_a_client_that_was_served_waits_for_a_router_longer_than_its_retries() -> None:
    router = FakeRouter()
    async with serve(router) as address, EaselClient(address, retries=1) as client:
        await client.status()
        router.unavailable_calls = 20
        assert (await client.generate("ab")).text == "ba"
        assert len(router.calls) == 21


async def test_without_patience_the_retries_are_all() -> None:
    router = FakeRouter()
    async with serve(router) as address, EaselClient(address, retries=1, patience_s=0) as client:
        await client.status()
        router.unavailable_calls = 20
        with pytest.raises(Unavailable, match="the router starts"):
            await client.generate("ab")
        assert len(router.calls) == 2


async def test_a_router_that_comes_back_at_its_port_is_found_again() -> None:
    router = FakeRouter()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        address = await first.enter_async_context(serve(router))
        client = await stack.enter_async_context(EaselClient(address, retries=0))
        await client.status()
        await first.aclose()
        asking = asyncio.create_task(client.status())
        await asyncio.sleep(0.2)
        await stack.enter_async_context(serve(router, int(address.rsplit(":", 1)[1])))
        assert (await asyncio.wait_for(asking, PATIENCE_S)).slots == 8


@pytest.mark.parametrize("stood", [False, True])
async def test_only_a_stream_that_stood_makes_a_fresh_start_for_the_retries(
    monkeypatch: pytest.MonkeyPatch, stood: bool
) -> None:
    monkeypatch.setattr("cluster.routers.STOOD_S", 0.0 if stood else 60.0)
    router = FakeRouter()
    router.accepted_and_broken = 5
    async with serve(router) as address, EaselClient(address, retries=2, patience_s=0) as client:
        if stood:
            assert canvases(await read(client.stream("hello"))) == [0, 1]
        else:
            with pytest.raises(Unavailable, match="the router goes away"):
                await read(client.stream("hello"))
    assert len(router.calls) == (6 if stood else 3)


async def test_the_pause_is_what_the_server_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    def pause(attempt: int, retry_after_ms: int | None, uniform: float) -> float:
        asked.append((attempt, retry_after_ms))
        return 0.0

    monkeypatch.setattr("cluster.routers.backoff_s", pause)
    router = FakeRouter()
    router.unavailable_calls, router.retry_after_ms, router.breaks_after = 2, 700, [0]
    async with serve(router) as address, EaselClient(address) as client:
        await read(client.stream("hello"))
    assert asked == [(0, 700), (1, 700), (0, 1)]


async def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    router = FakeRouter()
    router.unavailable_calls, router.retry_after_ms = 1, 60_000
    async with serve(router) as address, EaselClient(address) as client:
        with pytest.raises(DeadlineExceeded, match="no answer before the deadline: the router starts"):
            await client.generate("ab", timeout_s=1)


async def test_a_job_that_went_with_its_router_is_started_again_with_its_seed(pair: Pair) -> None:
    pair.first.breaks_after, pair.first.forgets = [0], True
    pair.second.seeds = iter([77])
    events = await read(pair.client.stream("hello", request_id="a"))
    assert canvases(events) == [0, 1]
    assert assemble(events).text == "olleh"
    calls = [*pair.first.calls, *pair.second.calls]
    assert sorted(calls) == ["StreamGenerate", "StreamGenerate", "Watch 1"]
    assert pair.first.parsed["a"].spec.sampling.seed == 9


async def test_a_watch_of_a_job_that_went_says_so(pair: Pair) -> None:
    await pair.client.submit("hello", request_id="a")
    pair.first.breaks_after, pair.first.forgets = [0], True
    with pytest.raises(JobNotFound, match="'a'"):
        await read(pair.client.watch("a"))


async def leave_when_resumed(pair: Pair, events: AsyncIterator[Event]) -> None:
    """Lose the stream at the first router, and leave it while the second one holds it."""
    pair.first.breaks_after, pair.second.holds_after = [0], 1
    reading = asyncio.create_task(read(events))
    await asyncio.wait_for(pair.second.hanging.wait(), PATIENCE_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_cancelling_a_task_that_went_on_elsewhere_stops_its_job(pair: Pair) -> None:
    await leave_when_resumed(pair, pair.client.stream("hello", request_id="a"))
    assert pair.first.cancelled + pair.second.cancelled == ["a"]


async def test_closing_a_stream_that_went_on_elsewhere_stops_its_job(pair: Pair) -> None:
    pair.first.breaks_after = [0]
    async with aclosing(pair.client.stream("hello", request_id="a")) as events:
        async for event in events:
            if isinstance(event, Committed) and event.canvas_index == 1:
                break
    assert pair.second.cancelled == ["a"]


async def test_closing_a_stream_that_is_at_its_end_stops_nothing(pair: Pair) -> None:
    pair.first.breaks_after = [0]
    async with aclosing(pair.client.stream("hello", request_id="a")) as events:
        async for event in events:
            if isinstance(event, Finished):
                break
    assert pair.first.cancelled + pair.second.cancelled == []


async def test_leaving_a_watch_that_went_on_elsewhere_leaves_the_job_alone(pair: Pair) -> None:
    await pair.client.submit("hello", request_id="a")
    await leave_when_resumed(pair, pair.client.watch("a"))
    assert pair.first.cancelled + pair.second.cancelled == []


async def test_leaving_a_stream_that_joined_anothers_job_leaves_the_job_alone(pair: Pair) -> None:
    await pair.client.submit("hello", request_id="a")
    await leave_when_resumed(pair, pair.client.stream("hello", request_id="a"))
    assert pair.first.cancelled + pair.second.cancelled == []


async def test_leaving_a_call_that_never_broke_needs_no_order_to_stop(pair: Pair) -> None:
    pair.first.holds_after = 0
    async with aclosing(pair.client.stream("hello")) as events:
        async for event in events:
            if isinstance(event, Committed):
                break
    await asyncio.wait_for(pair.first.left.wait(), PATIENCE_S)
    assert pair.first.cancelled + pair.second.cancelled == []


async def test_cancelling_a_call_that_was_repeated_stops_its_job() -> None:
    router = FakeRouter()
    router.unavailable_calls = 1
    async with serve(router) as address, EaselClient(address) as client:
        asking = asyncio.create_task(client.generate("!hang", request_id="a"))
        await asyncio.wait_for(router.hanging.wait(), PATIENCE_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert router.cancelled == ["a"]


async def test_leaving_goes_through_when_nobody_is_left_to_tell(pair: Pair) -> None:
    events = pair.client.stream("hello")
    pair.first.breaks_after, pair.second.holds_after = [0], 1
    reading = asyncio.create_task(read(events))
    await asyncio.wait_for(pair.second.hanging.wait(), PATIENCE_S)
    await pair.client.close()
    with pytest.raises((asyncio.CancelledError, EaselError)):
        await asyncio.wait_for(reading, PATIENCE_S)
