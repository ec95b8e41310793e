"""The connection to Redis: bounded in time, with one kind of error for everything that means "not now"."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from cluster.errors import ConfigError, Unavailable

# Redis is there but cannot serve: it is full, a read-only replica after a failover, or has lost its primary.
_CANNOT_SERVE = (exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.ClusterDownError)
# The same, when a command inside a script met it: the code is then somewhere in the text.
_INSIDE_A_SCRIPT = ("-OOM ", "-READONLY ", "-MISCONF ")
_MAX_CONNECTIONS = 64


def connect(url: str, *, timeout_s: float = 2.0) -> Redis:
    """A client for `url` in which every connect, read and write is bounded by `timeout_s`; opens nothing yet.

    A connection that was lost is tried once more at once (Redis may have restarted); a timeout is not tried
    again, so a call takes no longer than one wait for a connection and one for its reply. Raises ConfigError
    for a URL that is not redis://, rediss:// or unix://.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(ConstantBackoff(0.02), 1, supported_errors=(exceptions.ConnectionError,)),
            protocol=2,
        )
    except (ValueError, TypeError) as error:
        allowed = "allowed are redis://[user:password@]host:port/db, rediss://... and unix://path"
        raise ConfigError(f"redis url is {without_password(url)!r}: {error}; {allowed}") from error
    return Redis.from_pool(pool)


def without_password(url: str) -> str:
    """`url` fit for a message: its user and password are left out."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url if "@" not in url else "***@" + url.rpartition("@")[2]
    return parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else url


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
        if not any(code in str(error) for code in _INSIDE_A_SCRIPT):
            raise
        raise Unavailable(f"Redis cannot be used now: {error}", retry_after_ms=retry_after_ms) from error
