"""One chaos run on a local cluster that is up: undisturbed, disturbed, compared."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from cluster.chaos.board import Board
from cluster.chaos.crowd import Crowd, Gate
from cluster.chaos.jobs import ChaosJob, draw_job
from cluster.chaos.killer import Killer
from cluster.chaos.options import ChaosOptions
from cluster.chaos.processes import members, shape_of
from cluster.chaos.queue_watch import QueueWatch
from cluster.chaos.reader import Reader
from cluster.chaos.recovery import recoveries
from cluster.chaos.report import Report
from cluster.chaos.schedule import BLOCK
from cluster.chaos.settling import settled
from cluster.chaos.targets import Targets, running
from cluster.chaos.transcript import Seen, Transcript
from cluster.chaos.verdict import MISSING, Ending, judge
from cluster.client import EaselClient
from cluster.errors import EaselError, JobFailed, JobNotFound

READY_S = 120.0
_JOBS_PER_STRIKE = 4


class ChaosRun:
    """Runs the jobs of a seed on the local cluster twice, the second time while the schedule strikes."""

    def __init__(self, options: ChaosOptions, address: str, board: Board) -> None:
        self._options = options
        self._address = address
        self._board = board
        self._jobs = [draw_job(options.seed, index) for index in range(options.jobs)]
        self._crowd = Crowd(options.in_flight, board.job_ended)
        # The same seed can run again on the same cluster, which keeps the jobs of the last time.
        self._token = uuid.uuid4().hex[:8]

    async def run(self) -> Report:
        """All findings, but for what is left once the cluster has been stopped. Raises EaselError."""
        async with EaselClient(self._address) as client:
            await client.wait_ready(READY_S)
            shape = shape_of(await asyncio.to_thread(members, running()))
            calm, calm_s = await self._calm()
            began_s = time.monotonic()
            gate = Gate(len(self._jobs), min(BLOCK, len(self._jobs) // _JOBS_PER_STRIKE))
            killer = self._killer(Targets(client, shape), client, gate)
            queue = QueueWatch(client)
            storm = await self._storm(killer, gate, queue)
            storm_s = time.monotonic() - began_s
            self._board.say("every reader has ended; waiting for the cluster to settle")
            leak = await settled(client, shape)
            endings = await _endings(client, [notes.job_id for notes in storm])
        return Report(
            seed=self._options.seed,
            transcripts=storm,
            endings=endings,
            verdicts=[judge(*each) for each in zip(calm, storm, endings, strict=True)],
            kills=killer.kills,
            skipped=killer.skipped,
            recoveries=list(recoveries(killer.kills, _timelines(storm), queue.waited_at_s)),
            leak=leak,
            seconds=storm_s,
            calm_seconds=calm_s,
        )

    async def _calm(self) -> tuple[list[Transcript], float]:
        """The undisturbed answers, and how long they took in s. Raises EaselError when one is not whole."""
        began_s = time.monotonic()
        self._board.begin("undisturbed", len(self._jobs))
        transcripts = await self._crowd.read_all(self._jobs, lambda job: self._reader(job, "calm").read_plainly())
        for notes in transcripts:
            if not notes.finished or notes.faults:
                wrong = notes.problem or "; ".join(notes.faults) or "its stream just stopped"
                raise JobFailed(f"nothing was killed yet, and job {notes.job_id} has no whole answer: {wrong}")
        return transcripts, time.monotonic() - began_s

    async def _storm(self, killer: Killer, gate: Gate, queue: QueueWatch) -> list[Transcript]:
        """The jobs again, until the last reader has ended. Raises what stopped the others before."""
        self._board.begin("disturbed", len(self._jobs))
        beside = [asyncio.create_task(killer.run()), asyncio.create_task(queue.run())]
        reading = asyncio.create_task(
            self._crowd.read_all(self._jobs, lambda job: self._reader(job, "storm").read(), gate)
        )
        try:
            await asyncio.wait((*beside, reading), return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                if task.done():
                    task.result()
            return reading.result()
        finally:
            everybody: list[asyncio.Task[Any]] = [*beside, reading]
            for each in everybody:
                each.cancel()
            await asyncio.gather(*everybody, return_exceptions=True)

    def _killer(self, targets: Targets, client: EaselClient, gate: Gate) -> Killer:
        options = self._options
        return Killer(targets, client, gate, seed=options.seed, every_s=options.kill_every_s, say=self._board.say)

    def _reader(self, job: ChaosJob, phase: str) -> Reader:
        return Reader(self._address, job, f"chaos-{self._token}-{phase}-{job.index:05d}")


def _timelines(storm: Sequence[Transcript]) -> list[list[Seen]]:
    return [timeline for notes in storm for timeline in notes.timelines]


async def _endings(client: EaselClient, job_ids: Sequence[str]) -> list[Ending]:
    """The jobs as the cluster has them now; once it does not answer, the rest are not asked for."""
    endings: list[Ending] = []
    for job_id in job_ids:
        try:
            endings.append(await _ending(client, job_id))
        except EaselError as error:
            unknown = Ending("unknown", notes=(f"the cluster does not answer: {error}",))
            return endings + [unknown] * (len(job_ids) - len(endings))
    return endings


async def _ending(client: EaselClient, job_id: str) -> Ending:
    """The job with its error and its history. Raises EaselError when the cluster does not answer."""
    try:
        job = await client.get(job_id)
    except JobNotFound:
        return MISSING
    notes = [f"{job.problem.reason}: {job.problem.message}"] if job.problem is not None else []
    notes += [f"attempt {run.epoch} on {run.replica}: {run.reason}: {run.message}" for run in job.history]
    return Ending(job.state, job.token_ids, job.usage.attempts, job.usage.preemptions, tuple(notes))
