"""The routers that a client can reach, and how it goes on when one of them does not answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from cluster.errors import ConfigError, DeadlineExceeded, EaselError, JobReleased, Unavailable
from cluster.rpc.options import channel_options
from cluster.rpc.status import error_from_rpc
from cluster.telemetry.caller import trace_metadata
from cluster.trust import Metadata, Trust

# A stream that stood for this long had come up again: what broke it is another outage, not the one before.
STOOD_S = 10.0
# A server that asks for a longer pause than this is asked again all the same.
LONGEST_PAUSE_S = 60.0
# How grpc begins when it found no server, against "Connection reset by peer" and the like from one that went away.
_NOBODY_THERE = ("failed to connect", "DNS resolution failed", "errors resolving")

Received = TypeVar("Received")
OpenCall = Callable[[grpc.aio.Channel], "grpc.aio.UnaryUnaryCall[Any, Received]"]


class Routers:
    """One channel for each target in `target` ("host:a,host:b"), for use in one event loop by any number of tasks.

    All tasks ask the same router, and go on to the next one together when it cannot be reached. Raises ConfigError
    for a target without a name, and for limits below 0.
    """

    def __init__(self, target: str, *, retries: int, patience_s: float, trust: Trust) -> None:
        self.target = target
        self._targets = tuple(part for part in (part.strip() for part in target.split(",")) if part)
        if not self._targets:
            raise ConfigError(f"target is {target!r}; it must be host:port, or several of these with commas between")
        for name, value in (("retries", retries), ("patience_s", patience_s)):
            if not value >= 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0")
        # Each target is worth a try before a cluster counts as not there.
        self.retries = max(retries, len(self._targets) - 1)
        self.patience_s = patience_s
        self.served = False  # whether any router was ever there
        self.current = 0
        self._trust = trust
        self._channels: dict[int, grpc.aio.Channel] = {}

    @property
    def is_open(self) -> bool:
        """True between the first use and `close`."""
        return bool(self._channels)

    async def close(self) -> None:
        """End the connections and every call on them. The next call would open one again."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def channel(self, number: int) -> grpc.aio.Channel:
        """The connection to a target. Made on first use: a channel belongs to the event loop that runs then."""
        if number not in self._channels:
            self._channels[number] = self._trust.channel(self._targets[number], [*channel_options()])
        return self._channels[number]

    @property
    def metadata(self) -> Metadata:
        """What every call brings along."""
        return (*self._trust.metadata(), *trace_metadata())

    def leave(self, number: int) -> None:
        """Ask the next router from now on, unless another task has left this one already."""
        if self.current == number:
            self.current = (number + 1) % len(self._targets)

    def tries(self, timeout_s: float | None = None) -> Tries:
        """The tries of a call that may take `timeout_s` in all."""
        return Tries(self, timeout_s)

    async def call(self, open_call: OpenCall[Received], tries: Tries) -> Received:
        """The answer to a call, which is repeated while no router can be reached. Raises an EaselError."""
        while True:
            try:
                reply = await open_call(tries.channel())
            except grpc.aio.AioRpcError as error:
                failure = self.failure_of(error)
            else:
                self.served = True
                return reply
            await tries.again(failure)

    def failure_of(self, error: grpc.aio.AioRpcError) -> EaselError:
        """A status as an error, with the status as its cause."""
        failure = error_from_rpc(error)
        if isinstance(failure, Unavailable) and str(failure).startswith(_NOBODY_THERE):
            failure = Unavailable(f"no {_insecure(str(failure))}cluster answers at {self.target}")
            failure.__cause__ = error
            return failure
        # Whatever else was said, somebody is there, or was a moment ago.
        self.served = True
        if isinstance(failure, JobReleased):
            # The cluster's own affair: the job goes on elsewhere, and so does whoever reads it.
            failure = Unavailable(str(failure), retry_after_ms=failure.retry_after_ms)
        failure.__cause__ = error
        return failure


class Tries:
    """The tries of one call: which router is asked, the pause between two, and the end of it.

    A call is repeated `retries` times when it finds nobody. Where the client was served before, a router is being
    replaced rather than absent: then the call goes on for `patience_s`, counted anew with every `progressed`.
    """

    def __init__(self, routers: Routers, timeout_s: float | None) -> None:
        self.repeated = False
        self._routers = routers
        self._now_s = asyncio.get_running_loop().time
        self._end_s = None if timeout_s is None else self._now_s() + timeout_s
        self._failed = 0
        self._since_s = 0.0
        self._asked = 0
        self._opened_s = 0.0
        self._heard = False

    @property
    def left_s(self) -> float | None:
        """What is left of the call's time; None without a limit."""
        return None if self._end_s is None else self._end_s - self._now_s()

    def channel(self) -> grpc.aio.Channel:
        """The connection for the next try."""
        self._asked, self._opened_s, self._heard = self._routers.current, self._now_s(), False
        return self._routers.channel(self._asked)

    def heard(self) -> None:
        """The try was answered, at least in part."""
        self._heard = self._routers.served = True

    def progressed(self) -> None:
        """What was waited for came nearer: the next failure is the first one again."""
        self._failed = 0

    async def again(self, failure: EaselError) -> None:
        """Turn to the next router, and pause. Raises `failure` when another try is no use, or was the last one.

        Raises DeadlineExceeded when the call's time would be over before the next try.
        """
        if not isinstance(failure, Unavailable):
            raise failure
        self._routers.leave(self._asked)
        now_s = self._now_s()
        if self._heard and now_s - self._opened_s >= STOOD_S:
            self.progressed()
        if self._failed == 0:
            self._since_s = now_s
        pause_s = min(backoff_s(self._failed, failure.retry_after_ms, random.random()), LONGEST_PAUSE_S)
        if self._failed >= self._routers.retries and not self._is_patient(now_s + pause_s):
            raise failure
        left_s = self.left_s
        if left_s is not None and pause_s >= left_s:
            raise DeadlineExceeded(f"no answer before the deadline: {failure}") from failure
        self._failed += 1
        self.repeated = True
        await asyncio.sleep(pause_s)

    def _is_patient(self, next_s: float) -> bool:
        return self._routers.served and next_s - self._since_s <= self._routers.patience_s


def _insecure(said: str) -> str:
    """What to add where somebody is there, but TLS failed: what is wrong is with certificates, not with the address."""
    return "trusted " if "handshak" in said.lower() or "certificate" in said.lower() else ""


def backoff_s(attempt: int, retry_after_ms: int | None, uniform: float) -> float:
    """Pause before retry number `attempt` (from 0): what the server asked for, else 0.1 s doubled each time.

    `uniform` in [0, 1) spreads the pause over its upper half, so that clients do not come back together.
    """
    full_s = min(0.1 * 2**attempt, 5.0) if retry_after_ms is None else retry_after_ms / 1000
    return full_s * (0.5 + 0.5 * uniform) if retry_after_ms is None else full_s * (1 + 0.25 * uniform)
