"""What the vllm engine and its plugin tell each other: one TCP connection, opened by the worker of rank 0.

vLLM hands out a canvas when it is committed, and nothing before. So the plugin, inside vLLM's worker, reports each
step over this connection, and holds still before a forward until the engine has asked for it:

    engine                            worker, rank 0
    Go            ──────────────>     runs one forward
                  <──────────────     StepEvent, one Canvas for each job that denoised in it
    Stop(key)     ──────────────>     no longer waits for this job's sake
    Snapshot(key) ──────────────>     answers with Saved, from between two forwards
    Open          ──────────────>     never waits again: the engine closes

Frames and the proof of a common key are those of torch_tp/link.py.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.engine.torch_tp.link import HELLO_TIMEOUT_S, join_lead, read_frame, send_frame, settle
from deployments.engine.torch_tp.payload import CanvasState

# extra_args of a vLLM request: the one name under which it carries a RequestPlan, as a dictionary of plain values.
EXTRA = "easel"


@dataclass(frozen=True, slots=True)
class Go:
    """One forward more."""


@dataclass(frozen=True, slots=True)
class Stop:
    key: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    key: str


@dataclass(frozen=True, slots=True)
class Open:
    """No forward waits any more."""


Order = Go | Stop | Snapshot | Open


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first word. `device` is torch's name of it; `ranks` is the tensor-parallel degree."""

    device: str
    ranks: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """One denoising step of one request. `argmax` int64 [canvas_tokens]; `step` counts from 1, entropy in nats."""

    key: str
    canvas_index: int
    step: int
    mean_entropy: float
    accepted_tokens: int
    argmax: NDArray[np.int64]
    converged: bool
    last: bool


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One forward. `cached_tokens` is context that requests which came in with it found in vLLM's prefix cache, of
    `context_tokens`; `prefill_tokens` is what the forward computed of prompts and committed canvases."""

    canvases: tuple[Canvas, ...] = ()
    prefill_tokens: int = 0
    context_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    key: str
    state: CanvasState | None


Word = Ready | StepEvent | Saved


@dataclass(frozen=True)
class Address:
    """Where the engine listens, and the key that both sides prove to know. Given to vLLM as additional_config."""

    host: str
    port: int
    key: bytes
    timeout_s: float

    def compute_hash(self) -> str:
        """vLLM hashes its configuration to name compiled graphs; where we listen does not change them."""
        return "easel"


class WorkerEnd:
    """The plugin's end. `wait` and `report` belong to the thread that runs forwards."""

    def __init__(self, address: Address, device: str, ranks: int, leave: Callable[[int], object] = os._exit) -> None:
        """`leave` ends this process when the replica is gone. Raises OSError when the engine is not there."""
        self._leave = leave
        self._peer = join_lead(address.host, address.port, address.key, 0, HELLO_TIMEOUT_S)
        settle(self._peer, address.timeout_s)
        self._news = threading.Condition()
        self._credits = 0
        self._open = False
        self._stopped: set[str] = set()
        self._wanted: list[str] = []
        self._send(Ready(device, ranks))
        threading.Thread(target=self._read, name="easel-orders", daemon=True).start()

    def wait(self, keys: set[str], snapshot: Callable[[str], CanvasState | None]) -> bool:
        """Waits, without a bound, until a forward over the requests `keys` may run; False if nobody waits for it."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._wanted or self._may_run(keys))
                wanted, self._wanted = self._wanted, []
                if not wanted:
                    return self._take(keys)
            for key in wanted:
                self._send(Saved(key, snapshot(key)))

    def forget(self, key: str) -> None:
        """The request has left vLLM."""
        with self._news:
            self._stopped.discard(key)

    def report(self, event: StepEvent) -> None:
        with suppress(OSError):  # the reader finds out, and ends the process
            self._send(event)

    def _may_run(self, keys: set[str]) -> bool:
        return bool(self._open or self._credits or keys <= self._stopped)

    def _take(self, keys: set[str]) -> bool:
        if self._open or keys <= self._stopped:
            return False
        self._credits -= 1
        return True

    def _send(self, word: Word) -> None:
        send_frame(self._peer, pickle.dumps(word))

    def _read(self) -> None:
        self._peer.settimeout(None)
        while True:
            try:
                order: Order = pickle.loads(read_frame(self._peer))
            except (OSError, EOFError):
                break
            with self._news:
                self._obey(order)
                self._news.notify_all()
        self._peer.close()
        if not self._open:
            # The replica is gone: nobody will ever ask for what this process computes, or end it.
            self._leave(1)

    def _obey(self, order: Order) -> None:
        if isinstance(order, Go):
            self._credits += 1
        elif isinstance(order, Stop):
            self._stopped.add(order.key)
        elif isinstance(order, Snapshot):
            self._wanted.append(order.key)
        else:
            self._open = True


class EngineEnd:
    """The engine's end. `put` wakes whoever waits in `next` with a word that did not come over the connection."""

    def __init__(self, peer: socket.socket, timeout_s: float) -> None:
        settle(peer, timeout_s)
        self._peer = peer
        self._words: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lost: str | None = None
        self._closing = False
        threading.Thread(target=self._read, name="vllm-words", daemon=True).start()

    @property
    def lost(self) -> str | None:
        """Why nothing will come any more, or None."""
        return self._lost

    def send(self, order: Order) -> None:
        """Raises OSError when the worker is gone."""
        send_frame(self._peer, pickle.dumps(order))

    def next(self, timeout_s: float) -> Word | None:
        """The next word; None at the end of the connection, or when there is none within `timeout_s`."""
        try:
            word: Word | None = self._words.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return word

    def fail(self, reason: str) -> None:
        """From any thread: whoever waits is woken, and `lost` says why."""
        if not self._closing:
            self._lost = self._lost or reason
        self._words.put(None)

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self.send(Open())
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def _read(self) -> None:
        self._peer.settimeout(None)
        with suppress(OSError, EOFError):
            while True:
                self._words.put(pickle.loads(read_frame(self._peer)))
        self.fail("vllm's worker has ended")
