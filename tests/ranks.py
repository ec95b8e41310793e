"""Ranks for tests: rank 0 is the test's own process, the others are processes that serve the whole session."""

from __future__ import annotations

import multiprocessing as mp
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from deployments.engine.torch_tp import ranks
from deployments.engine.torch_tp.group import Ranks
from deployments.engine.torch_tp.lead import LeadEngine
from deployments.engine.torch_tp.ranks import Meeting, Rendezvous, follow_rank, lead_rank, open_store

HOST = "127.0.0.1"
WAIT_S = 60.0
Answer = TypeVar("Answer")
# What a member runs: a function of this module or of a test's, its arguments.
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class Crew:
    """Processes for ranks 1, 2, ..., started when first needed. Owned by the `crew` fixture."""

    def __init__(self) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []

    def lead(self, folder: Path, world: int, **settings: Any) -> LeadEngine:  # noqa: ANN401 - by field
        """An engine of `world` ranks; a member may be a rank of several engines at a time."""
        meeting = Meeting(HOST, world, step_timeout_s=WAIT_S, start_timeout_s=WAIT_S)
        for rank in range(1, world):
            self._send(rank, _follow_apart, folder, meeting.rendezvous, rank, settings)
        return lead_rank(folder, meeting, device="cpu", **settings)

    def together(self, world: int, function: Callable[..., Answer], *arguments: object) -> list[Answer]:
        """What `function(group, *arguments)` returns on each rank, rank 0 first."""
        store = open_store(HOST, None, WAIT_S)
        for rank in range(1, world):
            self._send(rank, _in_group, store.port, rank, world, function, arguments)
        with closing(Ranks(store, 0, world, device=torch.device("cpu"), host=HOST, timeout_s=WAIT_S)) as group:
            answers = [function(group, *arguments)]
            return answers + [self._answer(rank) for rank in range(1, world)]

    def close(self) -> None:
        for _, pipe in self._members:
            pipe.close()
        for process, _ in self._members:
            process.join(WAIT_S)
            if process.is_alive():
                process.kill()

    def _send(self, rank: int, function: Callable[..., Any], *arguments: object) -> None:
        while len(self._members) < rank:
            self._members.append(spawn(_serve))
        self._members[rank - 1][1].send((function, arguments))

    def _answer(self, rank: int) -> Any:  # noqa: ANN401 - what the function gave
        pipe = self._members[rank - 1][1]
        assert pipe.poll(WAIT_S), f"rank {rank} does not answer"
        answer = pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def spawn(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A process that runs `target(pipe, *arguments)`, and this end of its pipe."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def lead_alone(pipe: Connection, folder: Path, world: int) -> None:
    """Rank 0 in a process of its own: gives its rendezvous away, then steps one endless job after another."""
    from tests.unit.test_tensor_parallel import endless

    torch.set_num_threads(1)
    meeting = Meeting(HOST, world, step_timeout_s=WAIT_S, start_timeout_s=WAIT_S)
    pipe.send(meeting.rendezvous)
    engine = lead_rank(folder, meeting, device="cpu", slots=1)
    engine.start(endless(engine.card))
    while True:
        engine.step()
        pipe.send(None)


def follow_alone(pipe: Connection, folder: Path, rendezvous: Rendezvous, rank: int) -> None:
    """A follower in a process of its own."""
    follow_rank(folder, rendezvous, rank=rank, device="cpu", slots=1)


def follow_without_memory(pipe: Connection, folder: Path, rendezvous: Rendezvous, rank: int) -> None:
    """A follower whose model does not fit."""
    full = MemoryError("all 3 bytes are taken")
    with mock.patch.object(ranks, "TorchEngine", side_effect=full):
        follow_alone(pipe, folder, rendezvous, rank)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        function(pipe, *arguments)


def _follow_apart(_: Connection, folder: Path, rendezvous: Rendezvous, rank: int, settings: dict[str, Any]) -> None:
    # In a thread, so that this process can be a rank of the next engine before this one ends.
    arguments = {"rank": rank, "device": "cpu", **settings}
    threading.Thread(target=follow_rank, args=(folder, rendezvous), kwargs=arguments, daemon=True).start()


def _in_group(
    pipe: Connection, port: int, rank: int, world: int, function: Callable[..., Any], arguments: Sequence[object]
) -> None:
    try:
        store = open_store(HOST, port, WAIT_S)
        with closing(Ranks(store, rank, world, device=torch.device("cpu"), host=HOST, timeout_s=WAIT_S)) as group:
            pipe.send(function(group, *arguments))
    except Exception as error:  # noqa: BLE001 - told to the test, which raises it
        pipe.send(error)
