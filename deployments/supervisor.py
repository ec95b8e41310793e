"""The jobs in a router's charge: those it accepted, and those it adopted from routers that are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from cluster.core import Placement
from cluster.errors import EaselError, JobCancelled, JobNotFound, Unavailable
from cluster.jobs.records import JobRecord
from cluster.jobs.states import JobState
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from deployments.charge import Charge, Submission, Surroundings
from deployments.feed import Feed

logger = logging.getLogger(__name__)

LEAVING_RETRY_MS = 100


class Supervisor:
    """Owns one task per job in this router's charge that has not ended.

    A job's ending is written to Redis by whoever sees it first: the replica (finish, refusal), the caller (cancel),
    or its charge (deadline). Whatever Redis then says is what the readers get.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._store = around.store
        self._charges: dict[str, Charge] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._beside: set[asyncio.Task[None]] = set()
        self._unknown: frozenset[str] = frozenset()
        self.leaving = False

    def feed(self, job_id: str) -> Feed | None:
        """The feed of a job in this router's charge, or None."""
        charge = self._charges.get(job_id)
        return None if charge is None else charge.feed

    def begin(self, submission: Submission, placement: Placement | None) -> Feed:
        """Take charge of a job that is stored; `placement` when it has its slot already."""
        job_id = submission.spec.job_id
        known = self._charges.get(job_id)
        if known is not None:
            return known.feed
        charge = self._charges[job_id] = Charge(submission, self._around)
        task = asyncio.create_task(charge.supervise(placement), name=f"job {job_id}")
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._forget(job_id))
        return charge.feed

    def ring(self, kind: str, job_id: str) -> None:
        """The doorbell rang: look at what it is about now."""
        charge = self._charges.get(job_id)
        if charge is not None:
            charge.ring(kind)
        elif kind == "adopted":
            self._run_beside(self._adopt((job_id,)))
        elif kind == "look":
            self._run_beside(self.look())

    async def cancel(self, job_id: str) -> None:
        """Stop a job whose caller left: Redis first, then our own stream to the replica."""
        record = await self._store.cancel(job_id)
        if record.state is not JobState.CANCELLED:
            return  # it ended by itself a moment earlier, and its own task says how
        charge, task = self._charges.get(job_id), self._tasks.get(job_id)
        if charge is not None:
            charge.feed.end(JobCancelled(f"job {job_id} was cancelled"))
        if task is not None:
            task.cancel()

    async def look(self) -> None:
        """Reap, place and adopt: rings may be missed, and a deadline or a lease rings nowhere. Raises Unavailable."""
        if not self.leaving:
            await self._adopt(await self._store.look(self._around.router))

    async def reconcile(self, owned: frozenset[str]) -> None:
        """Compare what Redis says this router has charge of with what it knows, once a heartbeat.

        A job that is unknown here for two heartbeats lost its supervision (the answer to its submit was lost, or an
        outage outlasted the patience): it is taken up. A stream under an epoch that is over ends. Raises Unavailable.
        """
        unknown = owned - self._charges.keys()
        again, self._unknown = unknown & self._unknown, unknown
        if not self.leaving:
            await self._adopt(again)
        streaming = [job_id for job_id, charge in self._charges.items() if charge.streams]
        for job_id, epoch in (await self._store.epochs(streaming)).items():
            charge = self._charges.get(job_id)
            if charge is not None:
                charge.overtaken_by(epoch)

    async def drain(self, timeout_s: float) -> None:
        """Let jobs end, up to a bound; what is left goes on elsewhere.

        Its readers are told to come back by another router. Ending our stream has the replica save the canvas in
        progress and release the job, and the other routers adopt it.
        """
        self.leaving = True
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        for job_id, charge in self._charges.items():
            charge.feed.end(leaving_error(self._around.router, job_id))
        left = list(self._tasks.values()) + list(self._beside)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _adopt(self, job_ids: Iterable[str]) -> None:
        wanted = [job_id for job_id in job_ids if job_id not in self._charges]
        records = await asyncio.gather(*(self._store.get(job_id) for job_id in wanted), return_exceptions=True)
        for job_id, record in zip(wanted, records, strict=True):
            if isinstance(record, JobRecord):
                self._take_up(record)
            elif not isinstance(record, JobNotFound):
                logger.warning("job %s could not be taken up, and is looked at again: %s", job_id, record)

    def _take_up(self, record: JobRecord) -> None:
        if record.state.terminal or record.router != self._around.router:
            return
        logger.info("job %s: taken up by router %s", record.job_id, self._around.router)
        spec = convert.job_spec_from_proto(pb.JobSpec.FromString(record.spec))
        deadline_s = None
        if record.deadline_ms is not None:
            left_s = (record.deadline_ms - record.now_ms) / 1000
            deadline_s = asyncio.get_running_loop().time() + left_s
        # Its callers are elsewhere, or come back: their leaving is no sign that nobody wants the answer.
        waited_s = (record.now_ms - record.created_ms) / 1000
        self.begin(Submission(spec, deadline_s, waited_s), None).attached += 1

    def _run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_logged(work))
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._charges.pop(job_id, None)


def leaving_error(router: str, job_id: str) -> Unavailable:
    """What readers get from a router that leaves."""
    message = f"router {router} is leaving; job {job_id} goes on: watch it from the next canvas, by any router"
    return Unavailable(message, retry_after_ms=LEAVING_RETRY_MS)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except EaselError as error:
        logger.warning("a look that a ring asked for failed, and is made again: %s", error)
