"""The router's connections to Denoiser replicas: one channel per address, dialled when first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

import grpc

from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.rpc.options import channel_options
from cluster.security.tls import PeerTls, Pem, channel_credentials

# A job is retried by its state, never by its transport.
CHANNEL_OPTIONS = (*channel_options(), ("grpc.enable_retries", 0))


class _Link(NamedTuple):
    """A channel, and what it was opened with."""

    channel: grpc.aio.Channel
    pem: Pem | None


class Replicas:
    """Owns the channels. A replica that left is forgotten, so that its port may be another's.

    With `tls` they are of mutual TLS. When its certificate has changed, new calls open a new channel; the older one
    stays for the streams on it until its replica leaves.
    """

    def __init__(self, tls: PeerTls | None = None) -> None:
        self._tls = tls
        self._links: dict[str, list[_Link]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> pb_grpc.DenoiserAsyncStub:
        """The internal service at an address (host:port)."""
        return pb_grpc.DenoiserStub(self._channel(address))

    def answer(self, addresses: Iterable[str]) -> bool:
        """Whether one of these has a connection; dials those that have none, and does not wait for them."""
        states = [self._channel(address).get_state(try_to_connect=True) for address in addresses]
        return grpc.ChannelConnectivity.READY in states

    def _channel(self, address: str) -> grpc.aio.Channel:
        links = self._links.setdefault(address, [])
        pem = None if self._tls is None else self._tls.current()
        if not links or links[-1].pem is not pem:
            links.append(_Link(self._open(address, pem), pem))
        return links[-1].channel

    def _open(self, address: str, pem: Pem | None) -> grpc.aio.Channel:
        if self._tls is None or pem is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        options = (*CHANNEL_OPTIONS, *self._tls.options)
        return grpc.aio.secure_channel(address, channel_credentials(pem), options=options)

    def forget(self, address: str) -> None:
        """Drop the channels to an address; streams on them get a moment to end."""
        for link in self._links.pop(address, []):
            task = asyncio.create_task(link.channel.close(grace=1.0))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def keep_only(self, addresses: frozenset[str]) -> None:
        """Forget every replica whose lease is gone."""
        for address in set(self._links) - addresses:
            self.forget(address)

    async def close(self) -> None:
        """Close every channel."""
        for address in list(self._links):
            self.forget(address)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2.0)
