"""A namespace says which version of the keys it holds."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from cluster.errors import ConfigError
from cluster.jobs.keys import SCHEMA, Keys
from cluster.jobs.store import JobStore
from tests.redis.helpers import new_job


async def test_a_new_namespace_is_of_our_version(store: JobStore, redis: Redis, namespace: str) -> None:
    for _ in range(2):
        await store.ping()
        assert await redis.get(Keys(namespace).schema) == SCHEMA


@pytest.mark.parametrize("version", [b"1", b"3", b"\xff"])
async def test_keys_of_another_version_are_a_config_error_that_says_what_to_do(
    store: JobStore, redis: Redis, namespace: str, version: bytes
) -> None:
    await redis.set(Keys(namespace).schema, version)
    shown = version.decode(errors="replace")
    named = f"state.namespace '{namespace}' holds keys of version {shown}; this Easel works with version 2"
    with pytest.raises(ConfigError, match=f"{named}: choose another namespace"):
        await store.ping()
    assert await redis.get(Keys(namespace).schema) == version


async def test_jobs_of_the_first_version_are_known_though_it_did_not_say_which_it_was(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    keys = Keys(namespace)
    await redis.zadd(keys.jobs, {"job": 1})
    await redis.hset(keys.job("job"), mapping={"state": "queued", "epoch": 0})
    with pytest.raises(ConfigError, match="holds keys of version 1"):
        await store.ping()
    # Once its jobs have expired, the namespace is free.
    await redis.delete(keys.job("job"))
    await store.ping()


async def test_a_redis_that_lost_its_keys_under_us_is_taken_again(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.ping()
    await redis.delete(Keys(namespace).schema)
    await store.submit(new_job())
    await store.ping()
    assert await redis.get(Keys(namespace).schema) == SCHEMA
