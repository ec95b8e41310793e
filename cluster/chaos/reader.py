"""The clients of a chaos run: each asks for its job, reads it in its style, and notes what it gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from cluster.chaos.jobs import ChaosJob, Style
from cluster.chaos.transcript import Hearing, Transcript
from cluster.client import EaselClient, Event, RequestOptions
from cluster.errors import EaselError

PATIENCE_S = 180.0
_REPEAT_S = 0.5
_NEVER = 2**31
_ENDED_BADLY = ("failed", "cancelled")

Result = TypeVar("Result")


class Reader:
    """The client side of one job; the job's id is its request's. What it gets is in `notes`.

    EaselClient hides a lost router by itself. A call that ends with an error that may pass is counted as broken here,
    and taken up again, so that one broken call does not hide what became of the job.
    """

    def __init__(self, address: str, job: ChaosJob, job_id: str) -> None:
        self._names = names_of(address)
        self._connections = job.index
        self._job = job
        self._options: RequestOptions = {**job.options, "request_id": job_id}
        self.notes = Transcript(job_id)

    async def read_plainly(self) -> Transcript:
        """One stream from the request to the end, whatever the job's style."""
        return await self._bounded(self._stream(_NEVER))

    async def read(self) -> Transcript:
        """Read in the job's own style."""
        ways: dict[Style, Callable[[], Awaitable[object]]] = {
            Style.STREAM: lambda: self._stream(_NEVER),
            Style.GENERATE: self._generate,
            Style.WATCH: lambda: self._watch(_NEVER),
            Style.LEAVE: self._leave,
            Style.CANCEL: self._cancel,
            Style.RECONNECT: self._reconnect,
            Style.REJOIN: self._rejoin,
        }
        return await self._bounded(ways[self._job.style]())

    def _connected(self) -> EaselClient:
        """A client with another connection than the one before."""
        self._connections += 1
        return EaselClient(self._names[self._connections % len(self._names)])

    async def _bounded(self, reading: Awaitable[object]) -> Transcript:
        try:
            await asyncio.wait_for(reading, PATIENCE_S)
        except TimeoutError:
            self.notes.problem = f"its reader gave up after {PATIENCE_S:.0f} s; before: {self.notes.problem}"
        return self.notes

    async def _stream(self, leaves_after_events: int) -> None:
        async with self._connected() as client:
            hearing = Hearing(self.notes)
            while not await self._listen(hearing, self._asked(client), leaves_after_events):
                if hearing.events:
                    await self._go_on(client, hearing)
                    return
                await asyncio.sleep(_REPEAT_S)  # not even accepted: there may be no job to watch

    async def _generate(self) -> None:
        async with self._connected() as client:
            answer = await self._until_done(lambda: client.generate(self._job.prompt, **self._options))
        if answer is not None:
            self.notes.answer(answer)

    async def _watch(self, leaves_after_events: int) -> Hearing:
        hearing = Hearing(self.notes)
        async with self._connected() as client:
            await self._submit(client)
            watched = client.watch(self.notes.job_id, drafts=True)
            if self.notes.problem is None and not await self._listen(hearing, watched, leaves_after_events):
                await self._go_on(client, hearing)
        return hearing

    async def _leave(self) -> None:
        """Close the stream in the middle: the job stops, for it has no reader any more."""
        await self._stream(self._job.leaves_after_events)
        self.notes.asked_to_stop = not self._is_over()

    async def _cancel(self) -> None:
        hearing = await self._watch(self._job.leaves_after_events)
        if self._is_over():
            return
        self.notes.asked_to_stop = True
        async with self._connected() as client:
            await self._until_done(lambda: client.cancel(self.notes.job_id))
            await self._go_on(client, hearing)

    async def _reconnect(self) -> None:
        """Go on from the next canvas, over a connection of its own."""
        hearing = await self._watch(self._job.leaves_after_events)
        await self._stay_away()
        if not self._is_over():
            async with self._connected() as client:
                await self._go_on(client, Hearing(self.notes, hearing.next_canvas))

    async def _rejoin(self) -> None:
        """Make the same request again: the job is joined, and read from its first canvas."""
        await self._watch(self._job.leaves_after_events)
        await self._stay_away()
        if not self._is_over():
            await self._stream(_NEVER)

    async def _stay_away(self) -> None:
        await asyncio.sleep(self._job.away_ms / 1000)

    def _is_over(self) -> bool:
        return self.notes.finished or self.notes.problem is not None

    def _asked(self, client: EaselClient) -> AsyncGenerator[Event, None]:
        return client.stream(self._job.prompt, drafts=True, **self._options)

    async def _submit(self, client: EaselClient) -> None:
        await self._until_done(lambda: client.submit(self._job.prompt, drafts=self._job.wants_drafts, **self._options))

    async def _go_on(self, client: EaselClient, hearing: Hearing) -> None:
        """Watch from the next canvas to the end."""
        while True:
            events = client.watch(self.notes.job_id, hearing.next_canvas, drafts=True)
            if await self._listen(hearing, events, _NEVER):
                return
            await asyncio.sleep(_REPEAT_S)

    async def _listen(self, hearing: Hearing, events: AsyncGenerator[Event, None], leaves_after_events: int) -> bool:
        """Hear a call out, or up to the event after which the client leaves; False when the call broke."""
        try:
            async with aclosing(events) as coming:
                async for event in coming:
                    hearing.hear(event, time.monotonic())
                    if hearing.events >= leaves_after_events:
                        return True
        except EaselError as error:
            return not await self._may_repeat(error)
        return True

    async def _until_done(self, call: Callable[[], Awaitable[Result]]) -> Result | None:
        """Make a call that is safe to repeat until it succeeds; None when its error will not pass."""
        while True:
            try:
                return await call()
            except EaselError as error:
                if not await self._may_repeat(error):
                    return None
            await asyncio.sleep(_REPEAT_S)

    async def _may_repeat(self, error: EaselError) -> bool:
        """Note an error: False when it is how the job ended, or will not pass."""
        said = f"{type(error).__name__}: {error}"
        self.notes.problem = said
        # A job that failed says so with the error it failed with, and that may be one of those that pass.
        if not error.retryable or await self._state() in _ENDED_BADLY:
            return False
        self.notes.broken_calls.append(said)
        self.notes.problem = None
        return True

    async def _state(self) -> str | None:
        try:
            async with self._connected() as client:
                return (await client.get(self.notes.job_id)).state
        except EaselError:
            return None


def names_of(address: str) -> tuple[str, ...]:
    """The names by which an address of this machine can be called.

    grpc gives all channels of a process that call an address by the same name one connection, hence one router of those
    that share the port: readers that use two names use two connections.
    """
    host, _, port = address.rpartition(":")
    return (address, f"localhost:{port}") if host == "127.0.0.1" else (address,)
