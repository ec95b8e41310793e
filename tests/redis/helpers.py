"""Short hands for jobs and replicas."""

from __future__ import annotations

from cluster.core import FinishReason, Placement, Priority
from cluster.jobs.records import JobFailure, NewJob, ReplicaHello
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore

BROKEN = JobFailure(code=13, reason="ENGINE", message="the engine broke")


def new_job(
    job_id: str = "job",
    *,
    priority: Priority = Priority.NORMAL,
    timeout_ms: int | None = None,
    digest: str = "digest",
    router: str = "router-1",
) -> NewJob:
    return NewJob(
        job_id=job_id,
        digest=digest,
        spec=b"\x00spec\xff",
        priority=priority,
        tenant="tenant",
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
