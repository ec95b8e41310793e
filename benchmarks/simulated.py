"""A day of traffic on simulated replicas: what a number of replicas costs, and how long jobs wait for a slot.

Replicas share their time among the canvases on them (processor sharing), so that a wider batch makes every canvas in it
slower. Jobs wait in one queue for a slot and keep it until their last canvas; a replica that goes gives its jobs back
with their progress. Exact in time: from one arrival, completion or decision to the next.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

SLOTS = 8
DECIDE_EVERY_S = 1.0
# What Serve's own policy looks back on, and what deployments/pace.py does.
ONGOING_S, PACE_S = 30, 10
# A step reads all weights (16 ms), and computes for every canvas (4 ms): an H100 with the 26B-A4B model in bfloat16.
# The two overlap, so that memory decides up to about 4 canvases and the arithmetic from about 8.
READ_S, COMPUTE_S = 0.016, 0.004
STEP_S: tuple[float, ...] = tuple(float((READ_S**4 + (COMPUTE_S * batch) ** 4) ** 0.25) for batch in range(SLOTS + 1))
CAP_STEPS, CAP_SHARE = 48, 0.21


@dataclass(frozen=True, slots=True)
class Traffic:
    """Jobs in order of arrival: seconds, denoising steps of all canvases, canvases."""

    at_s: list[float]
    steps: list[int]
    canvases: list[int]
    end_s: float


@dataclass(frozen=True, slots=True)
class Sight:
    """What a policy is shown: the present, ongoing jobs over the last ONGOING_S, and the pace over the last PACE_S."""

    now_s: float
    queued: int
    active: int
    ongoing_mean: float
    active_mean: float
    steps_per_s: float
    ready: int
    starting: int


Policy = Callable[[Sight], int]


@dataclass(slots=True)
class Replica:
    """`done_steps` counts the steps of its batch; the heap holds (count at which a job is done, job)."""

    ready_s: float
    now_s: float
    done_steps: float = 0.0
    jobs: list[tuple[float, int]] = field(default_factory=list)

    def advance(self, now_s: float) -> float:
        """Go on to `now_s`; returns the canvas steps made."""
        batch, before = len(self.jobs), self.now_s
        self.now_s = now_s
        if not batch:
            return 0.0
        made = (now_s - before) / STEP_S[batch]
        self.done_steps += made
        return made * batch

    def next_s(self) -> float:
        """When its next job is done."""
        if not self.jobs:
            return math.inf
        return self.now_s + max(0.0, self.jobs[0][0] - self.done_steps) * STEP_S[len(self.jobs)]


@dataclass(frozen=True, slots=True)
class Day:
    """What came of it. `waits_s` and `latencies_s` are of finished jobs, by job."""

    replica_hours: float
    waits_s: np.ndarray
    latencies_s: np.ndarray
    finished: int
    left: int
    changes: int
    most: int

    def wait_s(self, percent: float) -> float:
        """A percentile of the wait for the first slot."""
        return float(np.percentile(self.waits_s, percent))


def steps_per_canvas(rng: np.random.Generator, canvases: int) -> np.ndarray:
    """Denoising steps with the published moments: mean 26.6, median 23, p10 10, p90 48, and 21% at the cap.

    Shape (canvases,), int64. The part below the cap is uniform between the quantiles.
    """
    below = np.interp(rng.random(canvases), (0.0, 0.127, 0.633, 1.0), (4.0, 10.0, 23.0, 40.5))
    capped = rng.random(canvases) < CAP_SHARE
    return np.where(capped, CAP_STEPS, np.rint(below)).astype(np.int64)


def day(seed: int, *, hours: float, jobs_per_s: float, canvases_per_job: float = 4.0) -> Traffic:
    """A daily wave between 0.3 and 1.7 of the mean, and about one burst an hour: 1.5 to 3 times as much for minutes."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(int(hours * 3600))
    load = jobs_per_s * (1 - 0.7 * np.cos(2 * np.pi * seconds / 86_400))
    for start in np.nonzero(rng.random(len(seconds)) < 1 / 3600)[0]:
        length = int(60 + rng.exponential(240))
        load[start : start + length] *= rng.uniform(1.5, 3.0)
    counts = rng.poisson(load)
    at_s = np.sort(np.repeat(seconds, counts) + rng.random(counts.sum()))
    canvases = rng.geometric(1 / canvases_per_job, len(at_s))
    steps = np.add.reduceat(steps_per_canvas(rng, canvases.sum()), np.concatenate(([0], np.cumsum(canvases)[:-1])))
    return Traffic(at_s.tolist(), steps.tolist(), canvases.tolist(), float(len(seconds)))


class Simulation:
    """Runs a policy over traffic. `start_s`: from the wish for a replica until it serves; it costs from the wish on."""

    def __init__(self, traffic: Traffic, policy: Policy, *, start_s: float, replicas: int) -> None:
        self._traffic, self._policy, self._start_s = traffic, policy, start_s
        self._replicas = [Replica(0.0, 0.0) for _ in range(replicas)]
        self._starting: list[float] = []
        self._queue: deque[int] = deque()
        self._left: list[float] = [float(steps) for steps in traffic.steps]
        self._waits = np.full(len(traffic.at_s), np.nan)
        self._ends = np.full(len(traffic.at_s), np.nan)
        self._now_s = self._cost_s = self._ongoing_s = self._active_s = self._made_steps = 0.0
        self._ongoing = self._active = 0
        self._marks: deque[tuple[float, float, float, float]] = deque([(0.0, 0.0, 0.0, 0.0)])
        self._changes, self._most = 0, replicas

    def run(self) -> Day:
        """To the end of the traffic, and until the last job is done (at most another day)."""
        arrivals = enumerate(self._traffic.at_s)
        upcoming = next(arrivals, None)
        decide_s = DECIDE_EVERY_S
        while upcoming is not None or self._ongoing:
            done_s = min((replica.next_s() for replica in self._replicas), default=math.inf)
            if upcoming is not None and upcoming[1] <= min(done_s, decide_s):
                self._go_on(upcoming[1])
                self._arrive(upcoming[0])
                upcoming = next(arrivals, None)
            elif done_s <= decide_s:
                self._go_on(done_s)
                self._finish()
            else:
                self._go_on(decide_s)
                self._decide()
                decide_s += DECIDE_EVERY_S
                if decide_s > self._traffic.end_s + 86_400:
                    break
        return self._result()

    def _result(self) -> Day:
        finished = ~np.isnan(self._ends)
        return Day(
            replica_hours=self._cost_s / 3600,
            waits_s=self._waits[finished],
            latencies_s=(self._ends - np.asarray(self._traffic.at_s))[finished],
            finished=int(finished.sum()),
            left=self._ongoing,
            changes=self._changes,
            most=self._most,
        )

    def _go_on(self, now_s: float) -> None:
        passed_s = now_s - self._now_s
        self._cost_s += passed_s * (len(self._replicas) + len(self._starting))
        self._ongoing_s += passed_s * self._ongoing
        self._active_s += passed_s * self._active
        self._now_s = now_s

    def _arrive(self, job: int) -> None:
        self._ongoing += 1
        self._queue.append(job)
        self._place()

    def _place(self) -> None:
        """Jobs from the head of the queue to the replica with the fewest, as long as there is a slot."""
        while self._queue:
            replica = min(self._replicas, key=lambda each: len(each.jobs), default=None)
            if replica is None or len(replica.jobs) >= SLOTS:
                return
            job = self._queue.popleft()
            if np.isnan(self._waits[job]):
                self._waits[job] = self._now_s - self._traffic.at_s[job]
            self._made_steps += replica.advance(self._now_s)
            heapq.heappush(replica.jobs, (replica.done_steps + self._left[job], job))
            self._active += 1

    def _finish(self) -> None:
        replica = min(self._replicas, key=Replica.next_s)
        self._made_steps += replica.advance(self._now_s)
        _, job = heapq.heappop(replica.jobs)
        self._ends[job] = self._now_s
        self._active -= 1
        self._ongoing -= 1
        self._place()

    def _decide(self) -> None:
        for replica in self._replicas:
            self._made_steps += replica.advance(self._now_s)
        self._starting = list(self._up())
        current = len(self._replicas) + len(self._starting)
        wanted = self._policy(self._sight())
        self._changes += wanted != current
        self._most = max(self._most, wanted)
        self._starting += [self._now_s + self._start_s] * (wanted - current)
        for _ in range(current - wanted):
            if self._starting:
                self._starting.pop()
            else:
                self._drain(self._replicas.pop())
        self._place()

    def _up(self) -> Iterator[float]:
        """Those that still start; the others serve from now on."""
        for ready_s in self._starting:
            if ready_s <= self._now_s:
                self._replicas.append(Replica(ready_s, self._now_s))
            else:
                yield ready_s

    def _drain(self, replica: Replica) -> None:
        """It gives its jobs back to the head of the queue, with what is done of them."""
        for done_at, job in sorted(replica.jobs, reverse=True):
            self._left[job] = max(0.0, done_at - replica.done_steps)
            self._queue.appendleft(job)
            self._active -= 1

    def _sight(self) -> Sight:
        self._marks.append((self._now_s, self._ongoing_s, self._active_s, self._made_steps))
        if len(self._marks) > ONGOING_S / DECIDE_EVERY_S + 1:
            self._marks.popleft()
        first, then = self._marks[0], self._marks[max(0, len(self._marks) - 1 - int(PACE_S / DECIDE_EVERY_S))]
        passed_s = self._now_s - then[0]
        return Sight(
            now_s=self._now_s,
            queued=len(self._queue),
            active=self._active,
            ongoing_mean=(self._ongoing_s - first[1]) / (self._now_s - first[0]),
            active_mean=(self._active_s - then[2]) / passed_s,
            steps_per_s=(self._made_steps - then[3]) / passed_s,
            ready=len(self._replicas),
            starting=len(self._starting),
        )
