"""What every call to the state has in common: a client, the names, the scripts, and one kind of error."""

from __future__ import annotations

from typing import Self, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from cluster.config import StateSettings
from cluster.errors import ConfigError
from cluster.jobs.connection import redis_errors
from cluster.jobs.keys import SCHEMA, Keys
from cluster.jobs.limits import Limits
from cluster.jobs.refusals import refusal
from cluster.jobs.scripts import Call, Reply, Scripts


class Caller:
    """One namespace behind one Redis client. Owns `redis` and closes it; `limits` are the fields of Limits."""

    def __init__(self, redis: Redis, *, namespace: str = "easel", **limits: int) -> None:
        self._redis = redis
        self._keys = Keys(namespace)
        self._fixed = self._keys.fixed
        self._scripts = Scripts(redis)
        self._limits = Limits(**limits)
        self._has_quotas = False

    @classmethod
    def of(cls, redis: Redis, state: StateSettings) -> Self:
        """A store as the settings say."""
        return cls(redis, namespace=state.namespace, **{name: getattr(state, name) for name in Limits.names()})

    async def ping(self) -> None:
        """Reach Redis, check what the namespace holds, and give Redis the scripts.

        Raises Unavailable, or ConfigError for refused credentials and for keys of another version of Easel.
        """
        with redis_errors(self._limits.retry_after_ms):
            # By itself first: Redis 7 hangs up on a client that owes a password and sends a large command,
            # and that would look like a Redis that is away.
            await self._redis.ping()
            found = cast("bytes | None", await self._redis.get(self._keys.schema)) or await self._first_schema()
            await self._scripts.load()
        if found != SCHEMA:
            where = f"state.namespace {self._keys.namespace!r} holds keys of version {found.decode(errors='replace')}"
            raise ConfigError(f"{where}; this Easel works with version {SCHEMA.decode()}: choose another namespace")

    async def _first_schema(self) -> bytes:
        """The version of a namespace that does not say it: ours from now on, if no job of version 1 is there."""
        newest = cast("list[bytes]", await self._redis.zrange(self._keys.jobs, -1, -1))
        if newest:
            state, losses = await self._redis.hmget(self._keys.job(newest[0].decode()), ("state", "losses"))
            if state is not None and losses is None:
                return b"1"
        await self._redis.set(self._keys.schema, SCHEMA, nx=True)
        return cast(bytes, await self._redis.get(self._keys.schema))

    async def close(self) -> None:
        """Close the connections to Redis; whoever shares the client must be done with it."""
        await self._redis.aclose()

    def _call(self, name: str, keys: tuple[str, ...] = (), args: tuple[str | bytes | int, ...] = ()) -> Call:
        """A run of a script: the fixed keys and the limits first."""
        return Call(name, (*self._fixed, *keys), (self._limits.policy, *args))

    def _on_job(self, name: str, job_id: str, *args: str | bytes | int) -> Call:
        return self._call(name, (self._keys.job(job_id),), (job_id, *args))

    async def _run(self, call: Call, job_id: str = "", tried: str = "") -> Reply:
        (reply,) = await self._run_all((call,), job_id, tried)
        return reply

    async def _run_all(self, calls: tuple[Call, ...], job_id: str = "", tried: str = "") -> tuple[Reply, ...]:
        retry_after_ms = self._limits.retry_after_ms
        with redis_errors(retry_after_ms):
            try:
                if len(calls) == 1:
                    return (await self._scripts.run(calls[0]),)
                return tuple(await self._scripts.run_all(calls))
            except ResponseError as error:
                raise refusal(error, job_id, tried, retry_after_ms=retry_after_ms) or error from None
