"""How rank 0 tells the other ranks what to do before a step: one TCP connection to each, opened by the follower.

Both sides prove that they know a random key before anything else is read (HMAC-SHA256 over both sides' nonces). After
that they trust each other as far as torch.distributed and Ray do: what they send is neither encrypted nor signed.

A frame is 8 bytes of length and as many bytes; CLOSE in place of a length ends the conversation. A step without news
costs 8 bytes a follower. Of a dead peer, the operating system closes the connection; of a host that is gone, keepalive
does, within the timeout.
"""

from __future__ import annotations

import hmac
import pickle
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from deployments.engine.api import EngineJob

# A job to start, or the id of one to stop, in the order in which rank 0 did so.
Command = EngineJob | str
NONCE_BYTES = 32
HEADER = struct.Struct("<Q")
CLOSE = 2**64 - 1
MAX_FRAME_BYTES = 2**30
HELLO_TIMEOUT_S = 5.0


class Sender(Protocol):
    """Rank 0's end."""

    def send(self, log: Sequence[Command]) -> None:
        """Tells every follower to apply `log` and to step. Raises OSError or RuntimeError when one is gone."""

    def lost(self) -> str | None:
        """Which follower has gone, or None; costs no message, and may be asked from any thread."""

    def close(self, *, goodbye: bool) -> None:
        """Ends the link. With `goodbye` followers end in peace, without it they find the link broken."""


class Receiver(Protocol):
    """A follower's end."""

    def receive(self) -> tuple[Command, ...] | None:
        """Waits, without a bound, for the next step's log; None at a goodbye. Raises OSError when rank 0 is gone."""

    def close(self) -> None: ...


class SocketSender:
    """Sender over TCP. `followers` are authenticated sockets, of ranks 1, 2, ... in order."""

    def __init__(self, followers: Sequence[socket.socket]) -> None:
        self._followers = dict(enumerate(followers, start=1))
        # Health checks ask `lost` on a thread of their own.
        self._lock = threading.Lock()

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every follower has called `ready`. Raises RuntimeError with what the first failing one said."""
        deadline_s, waiting = time.monotonic() + timeout_s, set(self._followers)
        while waiting:
            left_s = max(0.0, deadline_s - time.monotonic())
            speaking = _readable({rank: self._followers[rank] for rank in waiting}, left_s)
            if not speaking:
                raise RuntimeError(f"{rank_names(waiting)} not ready after {timeout_s} s")
            for rank in speaking:
                try:
                    trouble = read_frame(self._followers[rank])
                except OSError as error:
                    raise RuntimeError(f"rank {rank} left while it loaded: {error}") from None
                if trouble:
                    raise RuntimeError(f"rank {rank} cannot start: {trouble.decode(errors='replace')}")
            waiting.difference_update(speaking)

    def send(self, log: Sequence[Command]) -> None:
        gone = self.lost()
        if gone is not None:
            raise RuntimeError(gone)
        body = pickle.dumps(tuple(log)) if log else b""
        frame = HEADER.pack(len(body)) + body
        for follower in self._followers.values():
            follower.sendall(frame)

    def lost(self) -> str | None:
        # Followers say nothing once they are ready: whatever there is to read is the end of a connection.
        with self._lock:
            gone = _readable(self._followers, 0.0)
        return f"{rank_names(gone)} left" if gone else None

    def close(self, *, goodbye: bool) -> None:
        with self._lock:
            followers, self._followers = self._followers, {}
        for follower in followers.values():
            with suppress(OSError):
                if goodbye:
                    follower.sendall(HEADER.pack(CLOSE))
            follower.close()


class SocketReceiver:
    """Receiver over TCP."""

    def __init__(self, lead: socket.socket) -> None:
        self._lead = lead

    def ready(self, trouble: str = "") -> None:
        """Tells rank 0 that this rank can step, or why it never will."""
        send_frame(self._lead, trouble.encode())

    def receive(self) -> tuple[Command, ...] | None:
        timeout_s = self._lead.gettimeout()
        self._lead.settimeout(None)
        header = _read_exactly(self._lead, HEADER.size)
        self._lead.settimeout(timeout_s)
        (size,) = HEADER.unpack(header)
        if size == CLOSE:
            return None
        log: tuple[Command, ...] = pickle.loads(_read_exactly(self._lead, size)) if size else ()
        return log

    def close(self) -> None:
        self._lead.close()


def accept_follower(listener: socket.socket, key: bytes, timeout_s: float) -> tuple[int, socket.socket] | None:
    """Takes one connection: the rank that it proves to be and its socket, or None for a stranger.

    Raises TimeoutError when nobody comes within `timeout_s`, which is also every later send's bound.
    """
    listener.settimeout(timeout_s)
    peer, _ = listener.accept()
    try:
        peer.settimeout(HELLO_TIMEOUT_S)
        mine = secrets.token_bytes(NONCE_BYTES)
        peer.sendall(mine)
        hello = _read_exactly(peer, HEADER.size + 2 * NONCE_BYTES)
        claim, proof = hello[:-NONCE_BYTES], hello[-NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(key, b"follower", mine, claim)):
            peer.close()
            return None
        peer.sendall(_proof(key, b"lead", claim, mine))
    except OSError:
        peer.close()
        return None
    return HEADER.unpack(claim[: HEADER.size])[0], peer


def join_lead(host: str, port: int, key: bytes, rank: int, timeout_s: float) -> socket.socket:
    """Connects to rank 0 and proves both sides. Raises OSError; ConnectionError when the other side has another key."""
    lead = socket.create_connection((host, port), timeout=timeout_s)
    try:
        theirs = _read_exactly(lead, NONCE_BYTES)
        claim = HEADER.pack(rank) + secrets.token_bytes(NONCE_BYTES)
        lead.sendall(claim + _proof(key, b"follower", theirs, claim))
        if not hmac.compare_digest(_read_exactly(lead, NONCE_BYTES), _proof(key, b"lead", claim, theirs)):
            raise ConnectionError(f"whoever listens at {host}:{port} does not have this group's key")
    except OSError:
        lead.close()
        raise
    return lead


def settle(peer: socket.socket, timeout_s: float) -> None:
    """Bounds every send by `timeout_s`, and finds a vanished host within about that, even when nothing is sent."""
    peer.settimeout(timeout_s)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third_s = max(1, int(timeout_s / 3))
    for name, value in (("TCP_KEEPIDLE", third_s), ("TCP_KEEPINTVL", third_s), ("TCP_KEEPCNT", 2)):
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def send_frame(peer: socket.socket, body: bytes) -> None:
    peer.sendall(HEADER.pack(len(body)) + body)


def read_frame(peer: socket.socket) -> bytes:
    """Raises ConnectionError at the end of the connection, TimeoutError after the socket's own bound."""
    return _read_exactly(peer, HEADER.unpack(_read_exactly(peer, HEADER.size))[0])


def _read_exactly(peer: socket.socket, size: int) -> bytes:
    if size > MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {size} bytes was announced; at most {MAX_FRAME_BYTES} are taken")
    read = bytearray()
    while len(read) < size:
        part = peer.recv(size - len(read))
        if not part:
            raise ConnectionError("the connection was closed by the other rank")
        read += part
    return bytes(read)


def _proof(key: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(key, side + first + second, "sha256")


def _readable(peers: Mapping[int, socket.socket], timeout_s: float) -> list[int]:
    """The ranks from which there is something to read, the end of the connection included."""
    poll, ranks = select.poll(), {peer.fileno(): rank for rank, peer in peers.items()}
    for descriptor in ranks:
        poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
    return sorted(ranks[descriptor] for descriptor, _ in poll.poll(timeout_s * 1000))


def rank_names(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"
