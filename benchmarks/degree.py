"""The engine at tensor-parallel degree 2 over degree 1: `python -m benchmarks.degree`.

Two processes of one thread each against one, the same jobs, wall-clock time. The tiny model is far below the size at
which cutting it pays: the ratio shows what driving two ranks and their sums over gloo cost. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from benchmarks.engine import CHECKPOINT, mixed_prompts
from benchmarks.serving import Arrival, one_thread, serve_with_engine
from cluster.checkpoint import Checkpoint, read_checkpoint
from deployments.engine.api import Engine
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.ranks import Meeting, Rendezvous, follow_rank, lead_rank

HOST = "127.0.0.1"
WAIT_S = 60.0
JOBS = 48
ROUNDS = 3
SETTINGS: dict[str, Any] = {"slots": 8, "device": "cpu", "prefix_reuse": False}


def measure_degree_ratio() -> dict[str, float]:
    """tokens/s at degree 2 over degree 1, the median of rounds that alternate."""
    checkpoint = read_checkpoint(CHECKPOINT)
    with one_thread(), two_ranks() as pair:
        single = TorchEngine(checkpoint, EngineSettings(**SETTINGS))
        ratios = [_tokens_per_s(pair, checkpoint) / _tokens_per_s(single, checkpoint) for _ in range(ROUNDS)]
    return {"degree_2_over_1": statistics.median(ratios)}


@contextmanager
def two_ranks() -> Iterator[Engine]:
    """An engine of two ranks: one here, one in a process of its own."""
    meeting = Meeting(HOST, 2, step_timeout_s=WAIT_S, start_timeout_s=WAIT_S)
    follower = mp.get_context("spawn").Process(target=_follow, args=(meeting.rendezvous,), daemon=True)
    follower.start()
    try:
        with closing(lead_rank(CHECKPOINT, meeting, **SETTINGS)) as engine:
            yield engine
        follower.join(WAIT_S)
    finally:
        follower.kill()
        follower.join()


def _follow(rendezvous: Rendezvous) -> None:
    follow_rank(CHECKPOINT, rendezvous, rank=1, **SETTINGS)


def _tokens_per_s(engine: Engine, checkpoint: Checkpoint) -> float:
    jobs = [Arrival(0.0, prompt) for prompt in mixed_prompts(checkpoint, JOBS)]
    return serve_with_engine(engine, jobs, checkpoint.card.defaults).tokens_per_s


def main() -> None:
    figures = measure_degree_ratio()
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
