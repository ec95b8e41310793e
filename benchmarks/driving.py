"""What it costs to tell the other ranks to step: ways to drive a tensor-parallel group, against ranks that just know.

Rank 1 is another process of this machine. A step is one sum of a single number over gloo, which every real step
begins with in some form; before it, rank 0 tells rank 1 to go, with nothing else to say. `lockstep` tells nothing,
because both count. `ray_call` calls a method of rank 1, an actor, and awaits its result; `ray_compiled` does so over
a compiled graph of Ray. The ways alternate; a figure is the median of the rounds, in microseconds a step, and over
`lockstep`. Prints one JSON line.

The engine uses `sockets`. A broadcast on torch.distributed needs no connection of its own, but notices a dead follower
only in the step after, and cannot be asked whether its peers are alive.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import pickle
import socket
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from benchmarks.driving_ray import RAY_WAYS, RayWays
from deployments.engine.torch_tp.group import Ranks
from deployments.engine.torch_tp.link import Command, Receiver, Sender, SocketReceiver, SocketSender, settle
from deployments.engine.torch_tp.ranks import open_store

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
ROUNDS = 7
STEPS = 300
WAYS = ("lockstep", "sockets", "broadcast")


class Broadcast:
    """Sender and Receiver over torch.distributed: the size of the log, then the log if there is one.

    A group of its own, because an idle follower waits here for longer than it may in a step.
    """

    def __init__(self, store: Store, rank: int) -> None:
        backend: Any = dist.ProcessGroupGloo
        options = backend._Options()
        options._devices = [backend.create_device(hostname=HOST)]
        options._timeout = timedelta(days=365)
        self._backend = backend(PrefixStore("drive", store), rank, 2, options)
        self._options = dist.BroadcastOptions()

    def send(self, log: Sequence[Command]) -> None:
        body = pickle.dumps(tuple(log)) if log else b""
        self._share(torch.tensor([len(body)]))
        if body:
            self._share(torch.frombuffer(bytearray(body), dtype=torch.uint8))

    def receive(self) -> tuple[Command, ...] | None:
        size = int(self._share(torch.zeros(1, dtype=torch.int64)))
        if size < 0:
            return None
        log: tuple[Command, ...] = ()
        if size:
            log = pickle.loads(self._share(torch.empty(size, dtype=torch.uint8)).numpy().tobytes())
        return log

    def lost(self) -> str | None:
        return None

    def close(self, *, goodbye: bool = False) -> None:
        if goodbye:
            self._share(torch.tensor([-1]))
        self._backend.shutdown()

    def _share(self, tensor: Tensor) -> Tensor:
        self._backend.broadcast([tensor], self._options).wait()
        return tensor


def measure_driving(rounds: int = ROUNDS, steps: int = STEPS) -> dict[str, float]:
    """Microseconds a step, per way, and ratios over `lockstep`."""
    torch.set_num_threads(1)
    with RayWays() as over_ray:
        figures = _measure(over_ray, rounds, steps)
    us = {way: statistics.median(values) for way, values in figures.items()}
    over = {f"driving_{way}_over_lockstep": round(value / us["lockstep"], 2) for way, value in us.items()}
    del over["driving_lockstep_over_lockstep"]
    return {f"driving_{way}_us": round(value, 1) for way, value in us.items()} | over


def _measure(over_ray: RayWays, rounds: int, steps: int) -> dict[str, list[float]]:
    store = open_store(HOST, None, TIMEOUT_S)
    listener = socket.create_server((HOST, 0))
    ports = (store.port, listener.getsockname()[1])
    follower = mp.get_context("spawn").Process(target=_follow, args=(*ports, rounds, steps), daemon=True)
    follower.start()
    listener.settimeout(TIMEOUT_S)
    peer, _ = listener.accept()
    settle(peer, TIMEOUT_S)
    senders: dict[str, Sender | None] = {"lockstep": None, "sockets": SocketSender([peer])}
    group = Ranks(store, 0, 2, device=torch.device("cpu"), host=HOST, timeout_s=TIMEOUT_S)
    senders["broadcast"] = Broadcast(store, 0)
    figures: dict[str, list[float]] = {way: [] for way in (*WAYS, *RAY_WAYS)}
    for _ in range(rounds):
        for way in WAYS:
            figures[way].append(_time_us(group, senders[way], steps))
        for way in RAY_WAYS:
            figures[way].append(over_ray.time_us(way, steps))
    follower.join(TIMEOUT_S)
    for sender in senders.values():
        if sender is not None:
            sender.close(goodbye=False)
    group.close()
    return figures


def _time_us(group: Ranks, link: Sender | None, steps: int) -> float:
    one = torch.ones(1)
    group.sum(one)
    start_s = time.perf_counter()
    for _ in range(steps):
        if link is not None:
            link.send(())
        group.sum(one)
    return (time.perf_counter() - start_s) / steps * 1e6


def _follow(store_port: int, link_port: int, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    lead = socket.create_connection((HOST, link_port), timeout=TIMEOUT_S)
    settle(lead, TIMEOUT_S)
    receivers: dict[str, Receiver | None] = {"lockstep": None, "sockets": SocketReceiver(lead)}
    store = open_store(HOST, store_port, TIMEOUT_S)
    group = Ranks(store, 1, 2, device=torch.device("cpu"), host=HOST, timeout_s=TIMEOUT_S)
    receivers["broadcast"] = Broadcast(store, 1)
    one = torch.ones(1)
    for _ in range(rounds):
        for way in WAYS:
            link = receivers[way]
            group.sum(one)
            for _ in range(steps):
                if link is not None:
                    link.receive()
                group.sum(one)


if __name__ == "__main__":
    print(json.dumps(measure_driving()))
