"""The connection to Redis: bounded in time, with one kind of error for everything that means "not now"."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from cluster.config import StateSettings
from cluster.errors import ConfigError, Unavailable
from cluster.jobs import secrets, sentinel

# Redis is there but cannot serve: it is full, a read-only replica after a failover, or has lost its primary.
_CANNOT_SERVE = (exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.ClusterDownError, sentinel.NoMaster)
# The same by its code, which up to Redis 6 stands somewhere in the text when a command inside a script met it.
_CANNOT_SERVE_CODE = re.compile(r"(^|-)(OOM|READONLY|MISCONF|NOREPLICAS|BUSY) ")
_MAX_CONNECTIONS = 64
_ALLOWED = f"allowed are redis://[user:password@]host:port/db, rediss://..., unix://path and {sentinel.ALLOWED}"


def connect_to(state: StateSettings) -> Redis:
    """A client as the settings say; see `connect`. Raises ConfigError, also for files that cannot be used."""
    return connect(state.url, timeout_s=state.timeout_s, **secrets.options_of(state))


def connect(url: str, *, timeout_s: float = 2.0, **options: Any) -> Redis:  # noqa: ANN401 - what redis-py takes
    """A client for `url` in which every connect, read and write is bounded by `timeout_s`; opens nothing yet.

    A connection that was lost is tried once more at once (Redis may have restarted); a timeout is not tried
    again, so a call takes no longer than one wait for a connection and one for its reply. Behind Sentinels
    (cluster.jobs.sentinel) a new connection first asks them for the master, within `timeout_s` as well. Raises
    ConfigError for a URL that is none of redis://, rediss://, unix://, redis+sentinel:// and rediss+sentinel://.
    """
    bounds: dict[str, Any] = {
        "max_connections": _MAX_CONNECTIONS,
        "timeout": timeout_s,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(ConstantBackoff(0.02), 1, supported_errors=(exceptions.ConnectionError,)),
        "protocol": 2,
        **options,
    }
    make_pool = sentinel.master_pool if sentinel.is_sentinel_url(url) else secrets.pool
    try:
        pool = make_pool(url, **bounds)
        # An option that redis-py does not know would else come out with the first command.
        pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    except (ValueError, TypeError, exceptions.RedisError) as error:
        raise ConfigError(f"redis url is {without_password(url)!r}: {_reason(error)}; {_ALLOWED}") from None
    return Redis.from_pool(pool)


def without_password(url: str) -> str:
    """`url` fit for a message: its user and password are left out, wherever they stand."""
    found = re.match(r"[a-z+]+://", url)
    scheme = found[0] if found else ""
    # The last @ counts: a password that is not percent-encoded can hold anything.
    _, mark, host = re.sub(r"password=[^&]*", "password=***", url.removeprefix(scheme)).rpartition("@")
    return f"{scheme}***@{host}" if mark else scheme + host


def _reason(error: Exception) -> str:
    """What is wrong with a URL. Python's own words for a bad port show it, and it can be a piece of a password."""
    return "its port is not a number" if str(error).startswith("Port could not be cast") else str(error)


@contextmanager
def keeps_cancellation() -> Iterator[None]:
    """Raises CancelledError at the end when the task was cancelled inside and did not notice.

    redis-py sends through asyncio.wait_for, which up to Python 3.11 drops a cancellation that meets a send just
    done (https://github.com/python/cpython/issues/86296). A loop around such a call would never end.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


@contextmanager
def redis_errors(retry_after_ms: int) -> Iterator[None]:
    """Turns what redis-py raises for a Redis that cannot be used now into Unavailable.

    Wrong credentials are ConfigError: waiting does not mend them. Replies of the scripts pass through. A
    cancelled call is cancelled, as `keeps_cancellation` says.
    """
    try:
        with keeps_cancellation():
            yield
    except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
        raise ConfigError(f"Redis refuses the credentials of the redis url: {error}") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, *_CANNOT_SERVE) as error:
        raise Unavailable(f"Redis cannot be used now: {error}", retry_after_ms=retry_after_ms) from error
    except exceptions.ResponseError as error:
        if not _CANNOT_SERVE_CODE.search(str(error)):
            raise
        raise Unavailable(f"Redis cannot be used now: {error}", retry_after_ms=retry_after_ms) from error
