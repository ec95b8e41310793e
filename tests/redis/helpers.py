"""Short hands for jobs and replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

from redis.asyncio import Redis

from cluster.core import FinishReason, Placement, Priority
from cluster.jobs.keys import Keys
from cluster.jobs.records import Checkpoint, JobFailure, NewJob, ReplicaHello
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore

BROKEN = JobFailure(code=13, reason="ENGINE", message="the engine broke")
SAVED = Checkpoint(version="v1", canvas_index=0, step=3, payload=b"\x00tokens\xff")


def new_job(
    job_id: str = "job",
    *,
    priority: Priority = Priority.NORMAL,
    timeout_ms: int | None = None,
    digest: str = "digest",
    router: str = "router-1",
    tenant: str = "tenant",
) -> NewJob:
    return NewJob(
        job_id=job_id,
        digest=digest,
        spec=b"\x00spec\xff",
        priority=priority,
        tenant=tenant,
        seed=2**64 - 1,
        prompt_tokens=7,
        timeout_ms=timeout_ms,
        router=router,
    )


def hello(replica: str = "replica-1", *, slots: int = 1) -> ReplicaHello:
    return ReplicaHello(
        replica=replica, address=f"{replica}:1", model="tiny", version="v1", slots=slots, stats={"steps": 1.5}
    )


async def running(store: JobStore, job_id: str = "job", *, slots: int = 1) -> Placement:
    """A job that runs on replica-1."""
    await store.heartbeat_replica(hello(slots=slots))
    _, placement = await store.submit(new_job(job_id))
    assert placement is not None
    return placement


async def bring_to(store: JobStore, state: JobState) -> int:
    """The job `job` in `state`, next to a replica that is live but has no slot for it yet; returns its epoch."""
    if state is JobState.QUEUED:
        await store.heartbeat_replica(hello(slots=0))
        await store.submit(new_job())
        return 0
    epoch = (await running(store)).epoch
    if state is JobState.SUCCEEDED:
        await store.finish("job", epoch, FinishReason.LENGTH)
    elif state is JobState.FAILED:
        await store.fail("job", BROKEN, epoch=epoch)
    elif state is JobState.CANCELLED:
        await store.cancel("job")
    return epoch


async def requeued(store: JobStore) -> int:
    """The job `job`, back in the queue after one run that was no loss; returns the epoch of that run."""
    epoch = (await running(store)).epoch
    await store.drain_replica("replica-1")
    await store.release("job", epoch, AttemptEnd.DRAINED, "drained")
    return epoch


async def commit(store: JobStore, job_id: str, epoch: int, index: int) -> None:
    """One more canvas."""
    await store.commit(job_id, epoch, index, b"canvas %d" % index, tokens=1, denoising_steps=1)


async def on(store: JobStore, *job_ids: str) -> list[str]:
    """The replica of each job; "" for one that does not run."""
    placements = [await store.placement(job_id) for job_id in job_ids]
    return [placement.replica if placement else "" for placement in placements]


async def end_lease(redis: Redis, namespace: str, kind: Literal["replicas", "routers"], name: str) -> None:
    """As if the process had not been heard for a lease, and everybody else had."""
    base = Keys(namespace).base
    await redis.zadd(f"{base}:{kind}", {name: 1}, xx=True)
    await redis.hset(f"{base}:pulse", "grace_ms", 1)


@asynccontextmanager
async def rings(redis: Redis, namespace: str) -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
    """Yields what returns the rings to processes since it was asked last, as "<process> <kind> <job>"."""
    prefix = f"{Keys(namespace).base}:bell:process:"
    pubsub = redis.pubsub()
    await pubsub.psubscribe(f"{prefix}*")
    assert (await pubsub.get_message(timeout=5.0) or {})["type"] == "psubscribe"

    async def heard() -> list[str]:
        found: list[str] = []
        # Rings come in order: behind one of our own there is none left.
        await redis.publish(f"{prefix}end", "of it")
        while not found or found[-1] != "end of it":
            message = await pubsub.get_message(timeout=5.0)
            assert message is not None
            found.append(message["channel"].decode().removeprefix(prefix) + " " + message["data"].decode())
        return found[:-1]

    yield heard
    await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
