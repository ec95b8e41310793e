"""A replica whose engine is lost while nothing runs: its health check says so, and it takes no more jobs."""

from __future__ import annotations

import pytest

from cluster.errors import EngineError
from tests.e2e.conftest import Connect, Start, until


async def test_a_replica_that_lost_its_engine_while_idle_leaves_and_the_next_job_goes_elsewhere(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = await start(replicas=2)
    replica = stack.replicas["denoiser-0"]
    replica.check()
    monkeypatch.setattr(stack.engines["denoiser-0"], "lost", lambda: "rank 1 left")
    with pytest.raises(EngineError, match="rank 1 left"):
        replica.check()
    client = connect(stack)

    async def has_left() -> bool:
        return [row.replica for row in (await client.status()).replicas] == ["denoiser-1"]

    await until(has_left)
    answer = await client.generate(tokens=[2, 3], max_new_tokens=8)
    assert answer.replica == "denoiser-1"
