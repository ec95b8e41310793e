"""Writes that are repeated while Redis is away."""

from __future__ import annotations

import pytest

from cluster.errors import StaleEpoch, Unavailable
from deployments.writing import persist


async def test_a_write_is_repeated_until_redis_is_back() -> None:
    tries = 0

    async def write() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Unavailable("away")
        return "written"

    assert await persist(write, patience_s=10.0) == "written"
    assert tries == 3


async def test_a_write_is_given_up_after_the_patience() -> None:
    async def write() -> None:
        raise Unavailable("away")

    with pytest.raises(Unavailable):
        await persist(write, patience_s=0.2)


async def test_a_refusal_is_not_repeated() -> None:
    tries = 0

    async def write() -> None:
        nonlocal tries
        tries += 1
        raise StaleEpoch("old")

    with pytest.raises(StaleEpoch):
        await persist(write, patience_s=10.0)
    assert tries == 1
