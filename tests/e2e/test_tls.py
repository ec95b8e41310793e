"""TLS on the public port and to the replicas, with certificates that change while the cluster runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import ClientTls
from cluster.config import parse_settings
from cluster.errors import ConfigError, Unavailable
from cluster.redis_server import free_port
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.security.check import check_files
from cluster.security.settings import InternalTlsSettings
from cluster.security.tls import PeerTls, channel_credentials
from tests.certificates import Authority, Issued
from tests.e2e.conftest import CHECKPOINT, Connect, Start

PROMPT = "count 31 to 34"


def mounted(folder: Path, generation: str, issued: Issued) -> dict[str, str]:
    """As Kubernetes mounts a secret: files are links through `..data`, and one rename swaps all of them."""
    issued.write(folder / generation)
    fresh = folder / "..data_tmp"
    fresh.symlink_to(generation)
    fresh.rename(folder / "..data")
    for name in ("tls.crt", "tls.key"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    return {"cert_file": str(folder / "tls.crt"), "key_file": str(folder / "tls.key")}


async def shown_by(address: str, authority: Authority) -> str:
    """The common name of the certificate that a new connection is shown."""

    def ask() -> str:
        context = ssl.create_default_context(cadata=authority.pem.decode())
        context.set_alpn_protocols(["h2"])
        host, _, port = address.partition(":")
        link = socket.create_connection((host, int(port)), timeout=5)
        with link, context.wrap_socket(link, server_hostname=host) as secure:
            found: Any = secure.getpeercert()
            return str(dict(pair for rdn in found["subject"] for pair in rdn)["commonName"])

    return await asyncio.to_thread(ask)


async def is_serving(address: str, credentials: grpc.ChannelCredentials | None = None) -> bool:
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def test_an_answer_comes_over_tls_and_over_nothing_else(start: Start, connect: Connect, tmp_path: Path) -> None:
    ours = Authority()
    stack = await start(security={"tls": ours.issue("router").write(tmp_path)})
    client = connect(stack, tls=ClientTls(ca_file=ours.write(tmp_path / "ca.pem")))
    assert (await client.generate(PROMPT, seed=1)).text
    for trust in ({}, {"tls": ClientTls(ca_file=Authority("another").write(tmp_path / "other.pem"))}):
        stranger = connect(stack, retries=0, **trust)
        with pytest.raises(Unavailable, match="cluster answers at"):
            await stranger.generate(PROMPT)


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    start: Start, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, folder = Authority(), tmp_path / "mounted"
    folder.mkdir()
    stack = await start(security={"tls": mounted(folder, "..1", ours.issue("first"))})
    address = stack.addresses["router-0"]
    client = connect(stack, tls=ClientTls(ca_file=ours.write(tmp_path / "ca.pem")))
    await client.generate(PROMPT, seed=1)
    assert await shown_by(address, ours) == "first"
    mounted(folder, "..2", ours.issue("second"))
    assert await shown_by(address, ours) == "second"
    await client.generate(PROMPT, seed=2)
    # A key that is another certificate's: what was good stays, and the log says so.
    mounted(folder, "..3", Issued(ours.issue("third").chain, ours.issue("fourth").key))
    assert await shown_by(address, ours) == "second"
    assert "is not the key of the certificate" in caplog.text
    mounted(folder, "..4", ours.issue("fifth"))
    assert await shown_by(address, ours) == "fifth"


async def test_callers_show_certificates_where_the_settings_ask_for_them(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    ours, callers = Authority(), Authority("callers")
    ca_file = ours.write(tmp_path / "ca.pem")
    tls = ours.issue("router").write(tmp_path) | {"client_ca_file": callers.write(tmp_path / "callers.pem")}
    stack = await start(security={"tls": tls})
    shown = callers.issue("backend").write(tmp_path, "backend")
    assert (await connect(stack, tls=ClientTls(ca_file, **shown)).generate(PROMPT, seed=1)).text
    for wrong in ({}, Authority("others").issue("backend").write(tmp_path, "other")):
        with pytest.raises(Unavailable):
            await connect(stack, tls=ClientTls(ca_file, **wrong), retries=0).generate(PROMPT)


async def test_routers_reach_replicas_by_mutual_tls_and_nobody_else_does(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    ours, folder = Authority(), tmp_path / "mounted"
    folder.mkdir()
    named = ("easel-internal",)
    internal = mounted(folder, "..1", ours.issue("one", *named)) | {"ca_file": ours.write(tmp_path / "ca.pem")}
    stack = await start(security={"internal_tls": internal})
    client = connect(stack)
    assert (await client.generate(PROMPT, seed=1)).text
    # Changed under way: the next calls use the new one, and the answer is no other.
    mounted(folder, "..2", ours.issue("two", *named))
    assert (await client.generate(PROMPT, seed=1)).usage.attempts == 1
    address = (await client.status()).replicas[0].address
    stranger = Authority("others").issue("one", *named).write(tmp_path, "stranger")
    theirs = InternalTlsSettings(**stranger, ca_file=internal["ca_file"])
    peer = PeerTls(theirs)
    for channel in (
        grpc.aio.insecure_channel(address),
        grpc.aio.secure_channel(address, channel_credentials(peer.current()), options=peer.options),
    ):
        async with channel:
            stub: pb_grpc.DenoiserAsyncStub = pb_grpc.DenoiserStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in stub.Run(pb.RunRequest(epoch=1), timeout=5):
                    pass
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_probes_have_a_plaintext_port_with_nothing_but_health(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    ours, port = Authority(), free_port()
    keys = tmp_path / "keys"
    keys.write_text("")
    security = {"tls": ours.issue("router").write(tmp_path), "api_keys_file": str(keys)}
    stack = await start(security=security, router={"health_port": port})
    # Load balancers ask the public port, without a credential; probes ask the other one, without TLS.
    assert await is_serving(stack.addresses["router-0"], grpc.ssl_channel_credentials(ours.pem))
    assert await is_serving(f"127.0.0.1:{port}")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/easel.v1.Cluster/GetStatus")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await stack.routers.pop("router-0").close()
    with pytest.raises(grpc.aio.AioRpcError):
        await is_serving(f"127.0.0.1:{port}")


def broken(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What is wrong, and the settings that have it."""
    ours = Authority()
    good = ours.issue("good").write(folder, "good")
    late = ours.issue("late", from_days=-3, to_days=-1).write(folder, "late")
    early = ours.issue("early", from_days=1, to_days=2).write(folder, "early")
    mixed = good | {"key_file": late["key_file"]}
    swapped = {"cert_file": good["key_file"], "key_file": good["cert_file"]}
    return [
        (r"security\.tls\.cert_file: .*nowhere cannot be read", {"tls": good | {"cert_file": str(folder / "nowhere")}}),
        (r"security\.tls\.key_file: .*late\.key is not the key of", {"tls": mixed}),
        (r"security\.tls\.cert_file: .*late\.crt expired at", {"tls": late}),
        (r"security\.tls\.cert_file: .*early\.crt is not valid before", {"tls": early}),
        (r"security\.tls\.cert_file: .*good\.key holds no certificate", {"tls": swapped}),
        (r"security\.tls\.client_ca_file: .*good\.key holds", {"tls": good | {"client_ca_file": good["key_file"]}}),
        (r"security\.internal_tls\.ca_file: .* cannot be read", {"internal_tls": good | {"ca_file": str(folder)}}),
        (r"security\.api_keys_file: .*: line 1 is no line", {"api_keys_file": good["key_file"]}),
    ]


def test_what_no_router_could_start_with_is_refused_by_the_name_of_the_setting(tmp_path: Path) -> None:
    for what, security in broken(tmp_path):
        settings = parse_settings({"checkpoint": str(CHECKPOINT), "security": security})
        with pytest.raises(ConfigError, match=what):
            check_files(settings.security)
