"""Serving under Poisson arrivals: the engine against transformers' generate, and prefix reuse on against off.

At a concurrency of N, jobs of mixed tasks arrive as a Poisson process (seeded, the same for both sides), twice as
fast as the engine finishes them, and at most N are in flight. The engine has N slots and takes a job at the next
step after its arrival. transformers takes whatever has arrived when it is free, up to N in a left-padded batch, as
people run it. Only useful tokens count, those of an answer before its EOS; latency is from arrival to the whole
answer. One process, one thread, float32; sides alternate, and figures are medians of the rounds' ratios. The last
line is one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import (
    CHECKPOINT,
    MAX_NEW_TOKENS,
    Prompt,
    Reference,
    load_reference,
    mixed_prompts,
    useful_tokens,
)
from cluster.checkpoint import Checkpoint, read_checkpoint
from cluster.core import SamplingParams
from deployments.engine.api import Engine, EngineJob
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine

# Jobs at most in flight -> jobs of a round: enough that arrivals, and not the ends of a round, make the figure.
JOBS = {1: 16, 2: 24, 4: 40, 8: 64, 16: 96, 32: 160}
CONCURRENCIES = (1, 8, 32)
# Well above 1, so that N are soon in flight, and jobs wait for slots and not slots for jobs.
OFFERED_LOAD = 2.0
ROUNDS = 3
PREFIX_TOKENS = 400
PREFIX_JOBS = 24
PREFIX_SLOTS = 8
PREFIX_STEPS = (2, 48)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job and when it comes, in seconds after the start."""

    at_s: float
    prompt: Prompt


@dataclass(slots=True)
class Served:
    """What one side made of the arrivals: useful tokens, seconds to the last answer, CPU seconds of this process in
    between, seconds per answer."""

    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    def latency_ms(self, fraction: float) -> float:
        """The latency that `fraction` of the answers stay below."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


@dataclass(frozen=True, slots=True)
class Point:
    """One concurrency: what the engine and transformers made of the same arrivals, round by round."""

    concurrency: int
    ours: list[Served]
    theirs: list[Served]

    @property
    def throughput_ratio(self) -> float:
        return _median(one.tokens_per_s / other.tokens_per_s for one, other in self._rounds())

    @property
    def latency_ratio(self) -> float:
        return _median(one.latency_ms(0.5) / other.latency_ms(0.5) for one, other in self._rounds())

    def _rounds(self) -> Iterable[tuple[Served, Served]]:
        return zip(self.ours, self.theirs, strict=True)


class Bench:
    """The checkpoint and transformers' model of it, loaded once."""

    def __init__(self, path: Path = CHECKPOINT) -> None:
        self.checkpoint = read_checkpoint(path)
        self._reference: Any = load_reference(path)

    def point(self, concurrency: int, rounds: int = ROUNDS) -> Point:
        """Both sides at one of the concurrencies in JOBS."""
        jobs = JOBS[concurrency]
        # Rounds repeat their prompts, which must not pay.
        engine = make_engine(self.checkpoint, concurrency, prefix_reuse=False)
        reference = Reference(self._reference, self.checkpoint, concurrency)
        prompts = mixed_prompts(self.checkpoint, jobs)
        reference.generate(prompts[:concurrency])
        # CPU time, so that a busy machine does not make the load lighter.
        together = [serve_with_engine(engine, [Arrival(0.0, prompt) for prompt in prompts]) for _ in range(2)][-1]
        point = Point(concurrency, [], [])
        for number in range(rounds):
            arrivals = poisson_arrivals(prompts, OFFERED_LOAD * jobs / together.cpu_s, seed=number)
            point.ours.append(serve_with_engine(engine, arrivals))
            point.theirs.append(serve_with_reference(reference, arrivals, concurrency))
        return point


def make_engine(checkpoint: Checkpoint, slots: int, prefix_reuse: bool = True) -> TorchEngine:
    """An engine on the CPU."""
    return TorchEngine(checkpoint, EngineSettings(slots=slots, device="cpu", prefix_reuse=prefix_reuse))


def poisson_arrivals(prompts: Sequence[Prompt], jobs_per_s: float, seed: int) -> list[Arrival]:
    """The prompts in order, the first at once, with exponential gaps."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    for prompt in prompts:
        arrivals.append(Arrival(at_s, prompt))
        at_s += rng.expovariate(jobs_per_s)
    return arrivals


def serve_with_engine(engine: Engine, arrivals: Sequence[Arrival], sampling: SamplingParams | None = None) -> Served:
    """Steps the engine until every arrival is answered; jobs wait where all slots are taken."""
    card, served = engine.card, Served()
    sampling = sampling or replace(card.defaults, max_new_tokens=MAX_NEW_TOKENS)
    waiting, answers = deque(enumerate(arrivals)), [list[int]() for _ in arrivals]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    while waiting or engine.stats().active_jobs:
        now_s = time.perf_counter() - start_s
        while waiting and waiting[0][1].at_s <= now_s and engine.stats().active_jobs < engine.slots:
            number, arrival = waiting.popleft()
            engine.start(EngineJob(str(number), arrival.prompt, replace(sampling, seed=number)))
        if not engine.stats().active_jobs:
            time.sleep(waiting[0][1].at_s - now_s)
        for commit in engine.step().commits:
            number = int(commit.job_id)
            answers[number] += commit.tokens
            if commit.last:
                served.latencies_s.append(time.perf_counter() - start_s - arrivals[number].at_s)
    served.wall_s, served.cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    served.tokens = sum(useful_tokens(answer, card.eos_token_ids) for answer in answers)
    return served


def serve_with_reference(reference: Reference, arrivals: Sequence[Arrival], concurrency: int) -> Served:
    """One batch after the other, each of what has arrived by then."""
    waiting, served = deque(arrivals), Served()
    torch.manual_seed(0)
    start_s = time.perf_counter()
    while waiting:
        now_s = time.perf_counter() - start_s
        if waiting[0].at_s > now_s:
            time.sleep(waiting[0].at_s - now_s)
            continue
        ready = sum(arrival.at_s <= now_s for arrival in waiting)
        batch = [waiting.popleft() for _ in range(min(ready, concurrency))]
        served.tokens += sum(reference.generate([arrival.prompt for arrival in batch]))
        end_s = time.perf_counter() - start_s
        served.latencies_s += [end_s - arrival.at_s for arrival in batch]
    served.wall_s = time.perf_counter() - start_s
    return served


def measure_serving_ratios(bench: Bench | None = None) -> dict[str, float]:
    """tokens/s and median latency of the engine over transformers, under Poisson arrivals."""
    with one_thread():
        bench = bench or Bench()
        points = [bench.point(size) for size in CONCURRENCIES]
    figures = {f"poisson_over_transformers_{point.concurrency}": point.throughput_ratio for point in points}
    latencies = {f"poisson_latency_over_transformers_{point.concurrency}": point.latency_ratio for point in points}
    return figures | latencies


def measure_prefix_reuse(checkpoint_path: Path = CHECKPOINT, rounds: int = ROUNDS) -> dict[str, float]:
    """Speed with prefix reuse over without where all jobs share 400 tokens of prefix, and the hit rate.

    24 answers of one canvas, 8 slots, CPU time. What prefill weighs depends on the steps per canvas: 2 is what the
    demo checkpoint takes for its own tasks, 48 its cap, which it always reaches after a prefix longer than it knows.
    """
    with one_thread():
        checkpoint = read_checkpoint(checkpoint_path)
        pairs = {steps: [_reuse_round(checkpoint, steps) for _ in range(rounds)] for steps in PREFIX_STEPS}
    figures = {
        f"prefix_reuse_on_over_off_{steps}_steps": _median(ratio for ratio, _ in measured)
        for steps, measured in pairs.items()
    }
    return figures | {"prefix_hit_rate": pairs[PREFIX_STEPS[0]][0][1]}


def _reuse_round(checkpoint: Checkpoint, steps: int) -> tuple[float, float]:
    """Speed on over off, and the hit rate, from fresh engines. Raises RuntimeError when reuse changes the answers."""
    jobs = [Arrival(0.0, prompt) for prompt in prompts_with_prefix(checkpoint, PREFIX_JOBS)]
    sampling = replace(
        checkpoint.card.defaults, max_new_tokens=checkpoint.card.canvas_tokens, max_denoising_steps=steps
    )
    engines = [make_engine(checkpoint, PREFIX_SLOTS, reuse) for reuse in (True, False)]
    ours, theirs = (serve_with_engine(engine, jobs, sampling) for engine in engines)
    stats = engines[0].stats()
    if ours.tokens != theirs.tokens:
        raise RuntimeError(f"prefix reuse made {ours.tokens} tokens, without it there are {theirs.tokens}")
    return theirs.cpu_s / ours.cpu_s, stats.prefix_hit_tokens / stats.prefix_lookup_tokens


def prompts_with_prefix(checkpoint: Checkpoint, count: int) -> list[Prompt]:
    """Prompts that share their first 400 tokens: one long text, then a task each."""
    tasks = mixed_prompts(checkpoint, count)
    text = [token for prompt in mixed_prompts(checkpoint, PREFIX_TOKENS) for token in prompt[2:-1]]
    prefix = (*tasks[0][:2], *text)[:PREFIX_TOKENS]
    return [(*prefix, *task[2:]) for task in tasks]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, and back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def measure_all() -> dict[str, float]:
    """Every figure of this module."""
    parts: tuple[Callable[[], dict[str, float]], ...] = (
        measure_serving_ratios,
        measure_prefix_reuse,
    )
    return {name: value for part in parts for name, value in part().items()}


def main() -> None:
    figures = measure_all()
    for name, value in figures.items():
        print(f"  {name:<40} {value:8.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
