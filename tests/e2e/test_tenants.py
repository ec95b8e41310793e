"""Credentials and tenants over real gRPC: who may call, whose jobs are whose, and what a tenant may have at once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.client import EaselClient, Finished
from cluster.errors import (
    EaselError,
    JobNotFound,
    PermissionDenied,
    QueueFull,
    QuotaExceeded,
    ReplicaNotFound,
    RequestIdReused,
    TransitionError,
    Unauthenticated,
)
from cluster.security.api_keys import new_key
from tests.e2e.conftest import Connect, Start, until

PROMPT = "count 31 to 34"


class Keys:
    """A file of keys, and the keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("# made by a test\n")

    def add(self, tenant: str, *, admin: bool = False, until: date | None = None) -> str:
        key, line = new_key(tenant, admin=admin, until=until)
        self.path.write_text(self.path.read_text() + line + "\n")
        return key

    @property
    def security(self) -> dict[str, Any]:
        return {"api_keys_file": str(self.path)}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


async def refusal(call: Awaitable[object]) -> EaselError:
    with pytest.raises(EaselError) as caught:
        await call
    return caught.value


async def test_a_call_without_a_good_key_is_refused_and_no_log_shows_a_key(
    start: Start, connect: Connect, keys: Keys, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    good, old = keys.add("acme"), keys.add("acme", until=date(2020, 1, 1))
    forged = good[:-1] + ("A" if good[-1] != "A" else "B")
    stack = await start(security=keys.security)
    assert (await connect(stack, api_key=good).generate(PROMPT, seed=1)).text
    for key, what in (
        (None, "no credential: send"),
        ("canary-4711-of-no-form", "the API key is not known"),
        (forged, "the API key is not known"),
        (old, "the API key was good until 2020-01-01"),
    ):
        error = await refusal(connect(stack, api_key=key).generate(PROMPT))
        assert isinstance(error, Unauthenticated)
        assert what in str(error)
        assert key is None or key not in str(error)
    out = caplog.text + "".join(capfd.readouterr())
    for key in (good, old, forged, "canary-4711-of-no-form"):
        assert key not in out
        assert key.removeprefix("easel_")[13:] not in out


async def test_a_key_counts_from_when_it_is_in_the_file_until_it_is_not(
    start: Start, connect: Connect, keys: Keys
) -> None:
    first = keys.add("acme")
    stack = await start(security=keys.security)
    second = keys.add("acme")
    client = connect(stack, api_key=second)
    job = await client.submit(PROMPT, request_id="shared")
    assert (await connect(stack, api_key=first).get(job.job_id)).tenant == "acme"
    lines = keys.path.read_text().splitlines()
    keys.path.write_text("\n".join(lines[:-1]) + "\n")
    assert isinstance(await refusal(client.get(job.job_id)), Unauthenticated)
    keys.path.write_text("this is no file of keys\n")
    assert await connect(stack, api_key=first).get(job.job_id)


async def test_the_tenant_is_the_credentials_and_naming_another_is_refused(
    start: Start, connect: Connect, keys: Keys
) -> None:
    client_key = keys.add("acme")
    stack = await start(security=keys.security)
    client = connect(stack, api_key=client_key)
    job = await client.submit(PROMPT, request_id="r1", seed=1)
    assert (job.tenant, job.job_id) == ("acme", "r1")
    assert (await client.submit(PROMPT, request_id="r1", seed=1, tenant="acme")).job_id == "r1"
    error = await refusal(client.generate(PROMPT, tenant="globex"))
    assert isinstance(error, PermissionDenied)
    assert str(error).startswith("tenant: 'globex' is not the tenant of the credential")


async def test_tenants_share_no_job_and_no_request_id(start: Start, connect: Connect, keys: Keys) -> None:
    acme_key, globex_key = keys.add("acme"), keys.add("globex")
    stack = await start(security=keys.security)
    acme, globex = connect(stack, api_key=acme_key), connect(stack, api_key=globex_key)
    ours = await acme.generate(PROMPT, request_id="r1", seed=1)
    assert ours.job_id == "r1"
    never = str(await refusal(globex.get("r2"))).replace("r2", "r1")
    for reading in (globex.get("r1"), globex.cancel("r1"), anext(globex.watch("r1"))):
        error = await refusal(reading)
        assert isinstance(error, JobNotFound)
        assert str(error) == never
    theirs = await globex.generate("sort 40718", request_id="r1", seed=2)
    assert theirs.text != ours.text
    assert (await acme.get("r1")).text == ours.text
    assert [(job.job_id, job.tenant) async for job in acme.jobs()] == [("r1", "acme")]
    assert [(job.job_id, job.tenant) async for job in globex.jobs("succeeded")] == [("r1", "globex")]
    assert isinstance(await refusal(acme.generate("sort 40718", request_id="r1")), RequestIdReused)
    with pytest.raises(EaselError, match="job_id"):
        await globex.get("acme/r1")


async def test_nothing_a_caller_reads_holds_the_stored_id(start: Start, connect: Connect, keys: Keys) -> None:
    key = keys.add("acme")
    stack = await start(security=keys.security, replicas=0)
    client = connect(stack, api_key=key)
    await client.submit(PROMPT, request_id="late", timeout_s=0.1)
    said = [str(await refusal(client.generate(PROMPT, request_id="late2", timeout_s=0.1)))]
    await until(lambda: _ended(client, "late"))
    job = await client.get("late")
    said += [repr(job), str(await refusal(anext(client.watch("late", 1))))]
    waiting = await client.submit(PROMPT, request_id="waits")
    await client.cancel(waiting.job_id)
    said += [str(await refusal(_drained(client, "waits"))), repr([job async for job in client.jobs()])]
    error = await refusal(client.cancel("late"))
    assert isinstance(error, TransitionError)
    assert "late" in str(error)
    said += [str(error), str(await refusal(client.submit("another", request_id="waits")))]
    assert not [text for text in said if "acme/" in text]


async def _ended(client: EaselClient, job_id: str) -> bool:
    return (await client.get(job_id)).state == "failed"


async def _drained(client: EaselClient, job_id: str) -> None:
    async for _ in client.watch(job_id):
        pass


async def test_only_an_admin_sees_replicas_and_drains_them(start: Start, connect: Connect, keys: Keys) -> None:
    tenant_key, admin_key = keys.add("acme"), keys.add("ops", admin=True)
    stack = await start(security=keys.security)
    tenant, admin = connect(stack, api_key=tenant_key), connect(stack, api_key=admin_key)
    status = await tenant.status()
    assert (status.slots, status.replicas, status.routers) == (2, (), ())
    assert [row.replica for row in (await admin.status()).replicas] == ["denoiser-0"]
    for replica in ("denoiser-0", "nobody"):
        assert isinstance(await refusal(tenant.drain(replica)), PermissionDenied)
    assert isinstance(await refusal(admin.drain("nobody")), ReplicaNotFound)
    assert await admin.drain("denoiser-0") == 0


async def test_reflection_needs_a_credential(start: Start, keys: Keys) -> None:
    key = keys.add("acme")
    stack = await start(security=keys.security)
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs know no aio

        async def services(metadata: tuple[tuple[str, str], ...]) -> list[str]:
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            call = stub.ServerReflectionInfo(asked, metadata=metadata, timeout=5)
            return [row.name async for reply in call for row in reply.list_services_response.service]

        assert "easel.v1.Jobs" in await services((("authorization", f"Bearer {key}"),))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await services(())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_job_outlives_its_router_for_its_tenant(start: Start, connect: Connect, keys: Keys) -> None:
    key = keys.add("acme")
    stack = await start(security=keys.security, state={"lease_ms": 500}, step_time_ms=40.0)
    await stack.add_router("router-1")
    client = connect(stack, "router-0", "router-1", api_key=key)
    await client.status()
    stream = client.stream("sort 40718", request_id="r1", seed=3, max_new_tokens=96)
    first = await anext(stream)
    await stack.crash_router("router-0")
    events = [first] + [event async for event in stream]
    assert isinstance(events[-1], Finished)
    alone = await connect(stack, "router-1", api_key=key).generate("sort 40718", seed=3, max_new_tokens=96)
    assert (await client.get("r1")).text == alone.text


async def test_quotas_refuse_by_name_and_hold_what_is_too_much(start: Start, connect: Connect, keys: Keys) -> None:
    acme_key, globex_key = keys.add("acme"), keys.add("globex")
    quotas = {"default": {}, "tenants": {"acme": {"running_canvases": 1, "queued_jobs": 2}}}
    stack = await start(security=keys.security | {"quotas": quotas}, step_time_ms=30.0)
    acme, globex = connect(stack, api_key=acme_key), connect(stack, api_key=globex_key)
    for number in range(3):
        await acme.submit(PROMPT, request_id=f"r{number}")
    error = await refusal(acme.submit(PROMPT))
    assert isinstance(error, QuotaExceeded)
    assert not isinstance(error, QueueFull)
    assert "security.quotas: queued_jobs" in str(error)
    assert error.retry_after_ms
    # The second slot is not acme's, and goes past acme's jobs to whoever comes next.
    await globex.submit(PROMPT, request_id="r0")
    assert (await globex.get("r0")).state == "running"
    assert [(await acme.get(f"r{number}")).state for number in range(3)] == ["running", "queued", "queued"]
    for number in range(3):
        await _drained(acme, f"r{number}")


async def test_requests_a_second_and_open_calls_are_bounded(start: Start, connect: Connect, keys: Keys) -> None:
    acme_key, globex_key = keys.add("acme"), keys.add("globex")
    tenants = {"acme": {"requests_per_s": 0.01, "burst": 2}, "globex": {"streams": 1}}
    stack = await start(security=keys.security | {"quotas": {"tenants": tenants}}, step_time_ms=100.0)
    acme, globex = connect(stack, api_key=acme_key), connect(stack, api_key=globex_key)
    for number in (0, 1, 1, 1):  # asking for a job that is there costs nothing
        await acme.submit(PROMPT, request_id=f"r{number}", seed=1)
    error = await refusal(acme.submit(PROMPT))
    assert isinstance(error, QuotaExceeded)
    assert "requests_per_s" in str(error)
    assert 90_000 < (error.retry_after_ms or 0) <= 100_000
    stream = globex.stream(PROMPT, request_id="one")
    await anext(stream)
    error = await refusal(globex.get("one"))
    assert isinstance(error, QuotaExceeded)
    assert "security.quotas: streams" in str(error)
    await stream.aclose()
    await until(lambda: _answers(globex, "one"))


async def _answers(client: EaselClient, job_id: str) -> bool:
    try:
        await client.get(job_id)
    except QuotaExceeded:
        return False
    return True


async def test_connections_and_streams_of_one_are_bounded(start: Start, connect: Connect) -> None:
    stack = await start(router={"max_connections": 2, "max_streams_per_connection": 2}, step_time_ms=200.0)
    first, second = connect(stack), connect(stack)
    streams = [first.stream(PROMPT), first.stream(PROMPT)]
    for stream in streams:
        await anext(stream)
    # The third call on the connection waits until one of the two has ended; the other connection is free.
    third = asyncio.create_task(first.status())
    assert (await second.status()).active == 2
    assert not third.done()
    assert str(await refusal(connect(stack, retries=0).status())).startswith("no ")
    await streams[0].aclose()
    await third
    await streams[1].aclose()


Sign = Callable[..., str]


@pytest.fixture
def issuer(tmp_path: Path) -> tuple[dict[str, Any], Sign]:
    """Settings, and what signs tokens by them."""
    private = ec.generate_private_key(ec.SECP256R1())
    row = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key()))
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [row | {"kid": "k1", "use": "sig", "alg": "ES256"}]}))
    settings = {"key_file": str(path), "issuer": "https://issuer", "audience": "easel"}
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

    def sign(*, key: Any = pem, algorithm: str = "ES256", kid: str = "k1", **claims: Any) -> str:  # noqa: ANN401
        usual = {
            "iss": "https://issuer",
            "aud": "easel",
            "tenant": "acme",
            "exp": datetime.now(UTC) + timedelta(hours=1),
        }
        chosen = {name: value for name, value in (usual | claims).items() if value is not None}
        return jwt.encode(chosen, key, algorithm=algorithm, headers={"kid": kid})

    return {"jwt": settings}, sign


async def test_a_token_of_the_issuer_is_as_good_as_a_key(
    start: Start, connect: Connect, issuer: tuple[dict[str, Any], Sign], keys: Keys
) -> None:
    security, sign = issuer
    key = keys.add("globex")
    stack = await start(security=security | keys.security)
    tenant = connect(stack, api_key=sign)  # asked for a fresh one at every call
    assert (await tenant.submit(PROMPT, request_id="r1")).tenant == "acme"
    assert (await connect(stack, api_key=key).submit(PROMPT, request_id="r1")).tenant == "globex"
    assert (await connect(stack, api_key=sign(easel_admin=True)).status()).replicas
    assert not (await connect(stack, api_key=sign(easel_admin="yes")).status()).replicas


async def test_no_other_token_is(start: Start, connect: Connect, issuer: tuple[dict[str, Any], Sign]) -> None:
    security, sign = issuer
    stack = await start(security=security)
    other = ec.generate_private_key(ec.SECP256R1())
    for token, what in (
        (sign(exp=datetime.now(UTC) - timedelta(minutes=5)), "has expired"),
        (sign(nbf=datetime.now(UTC) + timedelta(minutes=5)), "not valid yet"),
        (sign(exp=None), "lacks the claim 'exp'"),
        (sign(tenant=None), "lacks the claim 'tenant'"),
        (sign(tenant="a/b"), "names no tenant"),
        (sign(tenant=7), "names no tenant"),
        (sign(aud="another"), "another audience"),
        (sign(iss="https://another"), "another issuer"),
        (sign(key=other), "signature is wrong"),
        (sign(kid="k2"), "signed by a key that is not known"),
        (sign(key=b"s" * 32, algorithm="HS256"), "algorithm that is not allowed"),
        (jwt.encode({"tenant": "acme"}, "", algorithm="none", headers={"kid": "k1"}), "not allowed"),
        ("a.b.c", "cannot be read"),
    ):
        error = await refusal(connect(stack, api_key=token).status())
        assert isinstance(error, Unauthenticated), what
        assert what in str(error)
        assert token not in str(error)
