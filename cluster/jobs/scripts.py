"""Loads the Lua files, one per transition, and runs them by their digest.

A line `--@include name.lua` stands for the text of lua/lib/name.lua. Redis forgets scripts when it restarts,
so a missing one is loaded when Redis says so, and the call is made once more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

Reply: TypeAlias = "int | bytes | list[Reply] | None"

NAMES = (
    "submit",
    "assign",
    "commit",
    "checkpoint",
    "finish",
    "fail",
    "cancel",
    "release",
    "reap",
    "sweep",
    "adopt",
    "drain",
    "leave_replica",
    "leave_router",
    "heartbeat_replica",
    "heartbeat_router",
    "list",
    "view",
    "quotas",
)
_INCLUDE = re.compile(r"^--@include (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A composed script and the SHA-1 under which Redis knows it."""

    name: str
    text: str
    sha1: str


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script."""

    name: str
    keys: tuple[str, ...]
    args: tuple[str | bytes | int, ...]


def compose(name: str) -> Script:
    """The script of lua/<name>.lua with its includes. Raises FileNotFoundError for an unknown one."""
    folder = files("cluster.jobs").joinpath("lua")
    text = _INCLUDE.sub(lambda match: _text(folder / "lib" / match[1]), _text(folder / f"{name}.lua"))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _text(file: Traversable) -> str:
    return file.read_text(encoding="utf-8")


class Scripts:
    """The scripts of one Redis client, which it does not own."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._scripts = {name: compose(name) for name in NAMES}

    async def load(self) -> None:
        """Give Redis every script, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for script in self._scripts.values():
            pipeline.script_load(script.text)
        await pipeline.execute()

    async def run(self, call: Call) -> Reply:
        """Run one script in one round trip. Raises ResponseError with what the script refuses."""
        sha1 = self._scripts[call.name].sha1
        try:
            reply = await self._redis.evalsha(sha1, len(call.keys), *call.keys, *call.args)
        except NoScriptError:
            await self.load()
            reply = await self._redis.evalsha(sha1, len(call.keys), *call.keys, *call.args)
        return cast(Reply, reply)

    async def run_all(self, calls: Sequence[Call]) -> list[Reply]:
        """Run scripts in order in one round trip. Raises the first ResponseError; those behind it ran too.

        Where one is missing, it and those behind it run again: they must bear that.
        """
        replies = await self._send(calls)
        missing = next((i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)), None)
        if missing is not None:
            await self.load()
            replies = replies[:missing] + await self._send(calls[missing:])
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise reply
        return cast("list[Reply]", replies)

    async def _send(self, calls: Sequence[Call]) -> list[Reply | ResponseError]:
        pipeline = self._redis.pipeline(transaction=False)
        for call in calls:
            pipeline.evalsha(self._scripts[call.name].sha1, len(call.keys), *call.keys, *call.args)
        return cast("list[Reply | ResponseError]", await pipeline.execute(raise_on_error=False))
