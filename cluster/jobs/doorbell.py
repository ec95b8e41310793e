"""Rings over pub/sub. A ring is a hint that something changed; the truth is in the keys, so a lost one costs
time only: whoever waits looks again after its bound.

One connection and one task. Watches share the connection: a subscription is sent by whoever wants it, and
only the task reads. redis-py's own reconnecting is off here, because two tasks would race in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol, cast

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.errors import Unavailable
from cluster.jobs.connection import keeps_cancellation, redis_errors
from cluster.jobs.keys import Keys

_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 2.0
# A silent connection is asked for a sign of life after this long, and given up after twice this long.
_SILENCE_S = 5.0
_SUBSCRIBE_S = 2.0
_CLOSE_S = 5.0
# Whatever Redis says or fails to say on this connection: a new one is made, with a back-off.
_LOST = (exceptions.RedisError, OSError)

Callback = Callable[[str, str], None]


class Bell:
    """What one watcher of a job waits on. Rings between two waits are kept, as one."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake the watcher."""
        self._rung.set()

    async def wait(self, timeout_s: float) -> bool:
        """True when it rang since the last wait, False after `timeout_s`; look at the keys in both cases."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        rung = self._rung.is_set()
        self._rung.clear()
        return rung


class _Channel:
    """One subscribed channel: who listens, and whether Redis has confirmed it."""

    def __init__(self) -> None:
        self.bells: set[Bell] = set()
        self.confirmed = asyncio.Event()

    def confirm(self) -> None:
        # Confirmed again: the connection was lost in between, and with it perhaps a ring.
        if self.confirmed.is_set():
            self.ring()
        self.confirmed.set()

    def ring(self) -> None:
        for bell in self.bells:
            bell.ring()


class _Link(Protocol):
    """The parts of redis-py's connection that are used here; PubSub leaves its type open."""

    is_connected: bool
    retry: Retry


class Doorbell:
    """The rings of one process. Whoever starts it closes it, before the client it borrows."""

    def __init__(self, redis: Redis, *, namespace: str = "easel") -> None:
        self._redis = redis
        self._keys = Keys(namespace)
        self._own = ""
        self._callbacks: list[Callback] = []
        self._channels: dict[str, _Channel] = {}
        self._pubsub: PubSub | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, name: str) -> None:
        """Subscribe the channel of the process `name`. Raises Unavailable when Redis does not confirm."""
        self._own = self._keys.process_bell(name)
        channel = self._channels[self._own] = _Channel()
        with redis_errors(1000):
            await self._redis.ping()
        self._task = asyncio.create_task(self._run(), name=f"doorbell {name}")
        if not await _happens(channel.confirmed, _SUBSCRIBE_S):
            await self.close()
            raise Unavailable(f"Redis did not confirm a subscription within {_SUBSCRIBE_S} s", retry_after_ms=1000)

    async def close(self) -> None:
        """End the task and give the connection back. May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task}, timeout=_CLOSE_S)
        if task.done() and not task.cancelled():
            task.result()

    def on_ring(self, callback: Callback) -> None:
        """Call `callback(kind, job_id)` in the loop for every ring of this process; it must not block."""
        self._callbacks.append(callback)

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Bell]:
        """A bell for one job. What happens after entering rings; read the job's state after it, not before.

        While Redis cannot be reached the bell is silent, and rings once when it is back.
        """
        name, bell = self._keys.job_bell(job_id), Bell()
        channel = self._channels.setdefault(name, _Channel())
        channel.bells.add(bell)
        try:
            if not channel.confirmed.is_set():
                await self._tell("SUBSCRIBE", name)
                # Not confirmed in time: then the first confirmation must ring, like one after a loss.
                if not await _happens(channel.confirmed, _SUBSCRIBE_S):
                    channel.confirmed.set()
            yield bell
        finally:
            channel.bells.discard(bell)
            if not channel.bells and self._channels.get(name) is channel:
                del self._channels[name]
                await self._tell("UNSUBSCRIBE", name)

    async def _tell(self, command: str, channel: str) -> None:
        """Send without waiting for the answer; a lost connection is the task's business."""
        pubsub = self._pubsub
        if pubsub is None or not _link(pubsub).is_connected:
            return
        with suppress(*_LOST), keeps_cancellation():
            await (pubsub.subscribe(channel) if command == "SUBSCRIBE" else pubsub.unsubscribe(channel))

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            with suppress(*_LOST):
                async for _ in self._listen():
                    backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _listen(self) -> AsyncIterator[None]:
        """One connection's life: yields after every message, raises when the connection is lost."""
        pubsub = self._redis.pubsub()
        try:
            with keeps_cancellation():
                await pubsub.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            link = _link(pubsub)
            usual, link.retry = link.retry, Retry(NoBackoff(), 0, supported_errors=())
            try:
                self._pubsub = pubsub
                with keeps_cancellation():
                    await pubsub.subscribe(*self._channels)
                async for message in self._messages(pubsub):
                    self._deliver(message)
                    yield
            finally:
                self._pubsub = None
                link.retry = usual
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    async def _messages(self, pubsub: PubSub) -> AsyncIterator[dict[str, object]]:
        asked = False
        while True:
            with keeps_cancellation():
                message = await pubsub.get_message(timeout=_SILENCE_S)
            if message is not None:
                asked = False
                yield message
            elif asked:
                raise exceptions.ConnectionError("no sign of life")
            else:
                asked = True
                with keeps_cancellation():
                    await pubsub.ping()

    def _deliver(self, message: dict[str, object]) -> None:
        name = _text(message["channel"])
        channel = self._channels.get(name)
        if channel is None:
            return
        if message["type"] == "subscribe":
            channel.confirm()
        elif message["type"] == "message" and name == self._own:
            kind, _, job_id = _text(message["data"]).partition(" ")
            for callback in self._callbacks:
                # Through the loop: what a callback raises must not end the task.
                asyncio.get_running_loop().call_soon(callback, kind, job_id)
        elif message["type"] == "message":
            channel.ring()


def _link(pubsub: PubSub) -> _Link:
    return cast(_Link, pubsub.connection)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


async def _happens(event: asyncio.Event, timeout_s: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()
