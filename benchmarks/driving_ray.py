"""Ways to drive a follower over Ray: an actor call per step, and a compiled graph. See benchmarks/driving.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.dag import InputNode

from deployments.engine.torch_tp.group import Ranks
from deployments.engine.torch_tp.ranks import open_store

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
RAY_WAYS = ("ray_call", "ray_compiled")


class Follower:
    """Rank 1 of a group of two, as an actor."""

    def join(self, store_port: int) -> None:
        """Waits for rank 0."""
        torch.set_num_threads(1)
        store = open_store(HOST, store_port, TIMEOUT_S)
        self._group = Ranks(store, 1, 2, device=torch.device("cpu"), host=HOST, timeout_s=TIMEOUT_S)
        self._one = torch.ones(1)

    def step(self, number: int) -> int:
        """One sum with rank 0."""
        self._group.sum(self._one)
        return number


class RayWays:
    """A Ray of its own with one follower for each way; this process is rank 0 of both groups."""

    def __enter__(self) -> RayWays:
        ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        self._groups: dict[str, Ranks] = {}
        call, compiled = (self._follower(way) for way in RAY_WAYS)
        with InputNode() as number:
            graph = compiled.step.bind(number)
        self._graph: Any = graph.experimental_compile()
        self._send: dict[str, Callable[[int], Any]] = {
            "ray_call": call.step.remote,
            "ray_compiled": self._graph.execute,
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._graph.teardown()
        for group in self._groups.values():
            group.close()
        ray.shutdown()

    def time_us(self, way: str, steps: int) -> float:
        """Microseconds a step of `way`: tell the follower, sum with it, await its result."""
        group, send, one = self._groups[way], self._send[way], torch.ones(1)
        start_s = time.perf_counter()
        for number in range(steps):
            sent = send(number)
            group.sum(one)
            ray.get(sent)
        return (time.perf_counter() - start_s) / steps * 1e6

    def _follower(self, way: str) -> Any:  # noqa: ANN401 - a handle of an actor has no type
        actor: Any = ray.remote(num_cpus=0)(Follower).remote()
        store = open_store(HOST, None, TIMEOUT_S)
        joined = actor.join.remote(store.port)
        self._groups[way] = Ranks(store, 0, 2, device=torch.device("cpu"), host=HOST, timeout_s=TIMEOUT_S)
        ray.get(joined)
        return actor
