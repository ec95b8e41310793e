"""The router's connections to Denoiser replicas: one channel per address, dialled when first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.rpc.options import channel_options

# A job is retried by its state, never by its transport.
CHANNEL_OPTIONS = (*channel_options(), ("grpc.enable_retries", 0))


class Replicas:
    """Owns the channels. A replica that left is forgotten, so that its port may be another's."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> pb_grpc.DenoiserAsyncStub:
        """The internal service at an address (host:port)."""
        return pb_grpc.DenoiserStub(self._channel(address))

    def answer(self, addresses: Iterable[str]) -> bool:
        """Whether one of these has a connection; dials those that have none, and does not wait for them."""
        states = [self._channel(address).get_state(try_to_connect=True) for address in addresses]
        return grpc.ChannelConnectivity.READY in states

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return channel

    def forget(self, address: str) -> None:
        """Drop a channel; streams on it get a moment to end."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            task = asyncio.create_task(channel.close(grace=1.0))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def keep_only(self, addresses: frozenset[str]) -> None:
        """Forget every replica whose lease is gone."""
        for address in set(self._channels) - addresses:
            self.forget(address)

    async def close(self) -> None:
        """Close every channel."""
        for address in list(self._channels):
            self.forget(address)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2.0)
