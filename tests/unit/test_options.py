"""Who may share a port."""

from __future__ import annotations

import grpc
import pytest

from cluster.rpc.options import server_options


def server(*, share_port: bool) -> grpc.aio.Server:
    return grpc.aio.server(options=server_options(1024, share_port=share_port))


async def test_two_routers_share_a_port() -> None:
    first, second = server(share_port=True), server(share_port=True)
    port = first.add_insecure_port("127.0.0.1:0")
    assert second.add_insecure_port(f"127.0.0.1:{port}") == port
    for each in (first, second):
        await each.start()
    for each in (first, second):
        await each.stop(None)


@pytest.mark.parametrize("first_shares", [False, True])
async def test_a_server_that_does_not_share_finds_its_port_taken(first_shares: bool) -> None:
    first, second = server(share_port=first_shares), server(share_port=False)
    port = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    with pytest.raises(RuntimeError, match="Failed to bind"):
        second.add_insecure_port(f"127.0.0.1:{port}")
    await first.stop(None)
