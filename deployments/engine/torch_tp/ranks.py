"""Making a tensor-parallel group of processes: how its ranks meet, load, run and end. Knows nothing of who starts them.

    rank 0                                                   ranks 1 .. world - 1, each a process of its own
    meeting = Meeting(host, world)
    hand `meeting.rendezvous` to the others  ──────────────> follow_rank(folder, rendezvous, rank=r)
    engine = lead_rank(folder, meeting)                         loads its shard, then obeys
    engine.start(...), engine.step(), ...                       ...
    engine.close()  ───────────────────────────────────────> returns

`lead_rank` and every `follow_rank` run at the same time: each waits for the others. A process that dies on the way, or
later, makes all others raise; a group is never repaired, it is made anew.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store, TCPStore

from cluster import __version__
from cluster.checkpoint import Checkpoint, check_degree, read_checkpoint
from cluster.errors import ConfigError
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.group import Ranks
from deployments.engine.torch_tp.lead import LeadEngine, follow
from deployments.engine.torch_tp.link import (
    SocketReceiver,
    SocketSender,
    accept_follower,
    join_lead,
    rank_names,
    read_frame,
    send_frame,
    settle,
)

STEP_TIMEOUT_S = 30.0
START_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """What a follower must know; plain data, to be pickled. `key` is a secret.

    `step_timeout_s` bounds how late a rank may be within a step, `start_timeout_s` how long the ranks wait for each
    other to come, and to load.
    """

    host: str
    store_port: int
    link_port: int
    world: int
    step_timeout_s: float
    start_timeout_s: float
    key: bytes = field(repr=False)


class Meeting:
    """Rank 0's side of the rendezvous: two listening ports on `host`, an address at which the others reach it.

    While ranks are awaited, `check` is asked every LOOK_EVERY_S; it raises when one will never come. Owned by
    `lead_rank` once that is called; else `close` it.
    """

    def __init__(
        self,
        host: str,
        world: int,
        *,
        step_timeout_s: float = STEP_TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        self.listener = socket.create_server((host, 0))
        self.store = open_store(host, None, start_timeout_s)
        self.rendezvous = Rendezvous(
            host=host,
            store_port=self.store.port,
            link_port=self.listener.getsockname()[1],
            world=world,
            step_timeout_s=step_timeout_s,
            start_timeout_s=start_timeout_s,
            key=secrets.token_bytes(32),
        )

    def close(self) -> None:
        self.listener.close()


def lead_rank(folder: str | Path, meeting: Meeting, *, threads: int = 1, **settings: Any) -> LeadEngine:  # noqa: ANN401
    """Makes rank 0 of the group and waits until all ranks are ready. `settings` are the fields of EngineSettings.

    Raises CheckpointError, or ConfigError for a degree the model cannot be cut to, a bad setting, or ranks that differ
    in what they run; RuntimeError or OSError when a rank dies, fails or does not come in time.
    """
    torch.set_num_threads(threads)
    place = meeting.rendezvous
    link: SocketSender | None = None
    try:
        checkpoint, chosen = _read(folder, place, settings)
        link = SocketSender(_gather_followers(meeting, _facts(checkpoint, chosen)))
        engine = _engine(checkpoint, chosen, meeting.store, place, rank=0, host=place.host)
        link.wait_ready(place.start_timeout_s)
        return LeadEngine(engine, link)
    except BaseException:
        if link is not None:
            link.close(goodbye=False)
        raise
    finally:
        meeting.close()


def follow_rank(
    folder: str | Path,
    rendezvous: Rendezvous,
    *,
    rank: int,
    threads: int = 1,
    **settings: Any,  # noqa: ANN401 - the fields of EngineSettings
) -> None:
    """The whole life of rank `rank`, from 1 to world - 1; returns when rank 0 closes the group.

    Takes the same `folder` and `settings` as rank 0. Raises as `lead_rank`; OSError when rank 0 is gone.
    """
    torch.set_num_threads(threads)
    checkpoint, chosen = _read(folder, rendezvous, settings)
    lead = join_lead(rendezvous.host, rendezvous.link_port, rendezvous.key, rank, rendezvous.start_timeout_s)
    link = SocketReceiver(lead)
    try:
        engine = _load_follower(checkpoint, chosen, rendezvous, rank, lead, link)
        try:
            follow(engine, link)
        finally:
            engine.close()
    finally:
        link.close()


def _load_follower(
    checkpoint: Checkpoint,
    settings: EngineSettings,
    place: Rendezvous,
    rank: int,
    lead: socket.socket,
    link: SocketReceiver,
) -> TorchEngine:
    send_frame(lead, json.dumps(_facts(checkpoint, settings)).encode())
    refusal = read_frame(lead).decode()
    if refusal:
        raise ConfigError(refusal)
    settle(lead, place.step_timeout_s)
    try:
        store = open_store(place.host, place.store_port, place.start_timeout_s)
        # Peers reach this rank where it reaches rank 0 from.
        engine = _engine(checkpoint, settings, store, place, rank=rank, host=lead.getsockname()[0])
    except Exception as error:
        link.ready(f"{type(error).__name__}: {error}")
        raise
    link.ready()
    return engine


def _read(folder: str | Path, place: Rendezvous, settings: dict[str, Any]) -> tuple[Checkpoint, EngineSettings]:
    checkpoint, chosen = read_checkpoint(folder), EngineSettings(**settings)
    check_degree(checkpoint.config, place.world)
    return checkpoint, chosen


def _facts(checkpoint: Checkpoint, settings: EngineSettings) -> dict[str, Any]:
    """What must be equal on all ranks, or they would come apart. What explains other differences comes first."""
    return {
        "Easel version": __version__,
        **asdict(settings),
        "device": settings.torch_device.type,
        "model version": checkpoint.card.version,
        "torch version": str(torch.__version__),
    }


def _gather_followers(meeting: Meeting, facts: dict[str, Any]) -> list[socket.socket]:
    """Waits for all ranks above 0; their sockets in the order of ranks. Raises ConfigError when one differs."""
    place = meeting.rendezvous
    deadline_s, found = time.monotonic() + place.start_timeout_s, dict[int, socket.socket]()
    wanted = set(range(1, place.world))
    try:
        while wanted - found.keys():
            meeting.check()
            left_s = deadline_s - time.monotonic()
            try:
                arrived = accept_follower(meeting.listener, place.key, min(max(left_s, 0.001), LOOK_EVERY_S))
            except TimeoutError:
                if left_s > LOOK_EVERY_S:
                    continue
                missing = rank_names(wanted - found.keys())
                raise RuntimeError(f"{missing} did not come within {place.start_timeout_s} s") from None
            if arrived is not None:
                _welcome(arrived[0], arrived[1], wanted - found.keys(), facts)
                settle(arrived[1], place.step_timeout_s)
                found[arrived[0]] = arrived[1]
    except BaseException:
        for peer in found.values():
            peer.close()
        raise
    return [found[rank] for rank in sorted(found)]


def _welcome(rank: int, peer: socket.socket, wanted: set[int], facts: dict[str, Any]) -> None:
    theirs: dict[str, Any] = json.loads(read_frame(peer))
    different = [name for name, value in facts.items() if theirs.get(name) != value]
    refusal = ""
    if different:
        name = different[0]
        refusal = f"rank {rank} has {name} {theirs.get(name)}, rank 0 has {facts[name]}; all ranks must be alike"
    elif rank not in wanted:
        refusal = f"rank {rank} came, but the group waits for {rank_names(wanted)}"
    send_frame(peer, refusal.encode())
    if refusal:
        peer.close()
        raise ConfigError(refusal)


def _engine(
    checkpoint: Checkpoint, settings: EngineSettings, store: Store, place: Rendezvous, *, rank: int, host: str
) -> TorchEngine:
    group = Ranks(store, rank, place.world, device=settings.torch_device, host=host, timeout_s=place.step_timeout_s)
    try:
        return TorchEngine(checkpoint, settings, group)
    except BaseException:
        group.close()
        raise


def open_store(host: str, port: int | None, timeout_s: float) -> TCPStore:
    """The key-value store over which a backend finds its peers: a new one on `host` only, or rank 0's at `port`.

    Raises RuntimeError when there is none.
    """
    bound = timedelta(seconds=timeout_s)
    if port is not None:
        return TCPStore(host, port, None, False, bound, wait_for_workers=False)
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    # Left to itself, the store listens on all addresses. It takes over the socket.
    return TCPStore(host, port, None, True, bound, wait_for_workers=False, master_listen_fd=listener.detach())
