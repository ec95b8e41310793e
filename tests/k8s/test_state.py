"""The Redis of the jobs, started by the scripts of the manifests: first start, failover, a primary that comes back."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from cluster.config import StateSettings
from cluster.errors import EaselError
from cluster.jobs.connection import connect_to
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.store import JobStore
from cluster.redis_server import find_redis_server
from tests.k8s.state_pods import SECRETS, StatePods
from tests.redis.helpers import commit, running

BOUND_S = 60.0


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatePods]:
    """All six pods, started at once as Kubernetes does."""
    if not find_redis_server().with_name("redis-cli").exists():
        pytest.skip("redis-cli is not installed; the pods' scripts ask Sentinels with it")
    started = StatePods(tmp_path_factory.mktemp("state"))
    for number in range(3):
        started.start("state", number)
        started.start("sentinel", number)
    yield started
    started.close()


@asynccontextmanager
async def store_of(pods: StatePods, folder: Path) -> AsyncIterator[JobStore]:
    """As a router opens it, by the overlays' settings."""
    (folder / "password").write_text(SECRETS["PASSWORD"])
    state = StateSettings(url=pods.url, username="easel", password_file=str(folder / "password"))
    store = JobStore.of(connect_to(state), state)
    try:
        yield store
    finally:
        await store.close()


async def until_it_answers(store: JobStore) -> None:
    give_up_s = time.monotonic() + BOUND_S
    while True:
        try:
            await store.heartbeat_router("router-1")
        except EaselError:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(0.2)
        else:
            return


def ask(pods: StatePods, number: int, *words: str, user: str = "sentinel", password: str = "s3nt") -> object:
    host = pods.host("state", number)
    with redis.Redis(host=host, port=pods.port, username=user, password=password, socket_timeout=2.0) as client:
        return client.execute_command(*words)


def role(pods: StatePods, number: int) -> str:
    try:
        found = ask(pods, number, "ROLE")
    except redis.RedisError:
        return "away"
    assert isinstance(found, list)
    return str(found[0].decode())


async def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.2)


def primary(pods: StatePods) -> int | None:
    roles = [role(pods, number) for number in range(3)]
    return roles.index("master") if roles.count("master") == 1 and roles.count("slave") == 2 else None


def known(pods: StatePods, number: int) -> tuple[str, int, int, int]:
    """What a Sentinel knows: the primary's host, replicas that are well, replicas, and other Sentinels."""
    host = pods.host("sentinel", number)
    with redis.Redis(host=host, port=pods.sentinel_port, socket_timeout=2.0, decode_responses=True) as client:
        master = client.sentinel_master("easel")
        replicas = client.sentinel_slaves("easel")
        well = [entry for entry in replicas if entry["flags"] == "slave" and entry["master-link-status"] == "ok"]
        return str(master["ip"]), len(well), len(replicas), int(master["num-other-sentinels"])


async def settled(pods: StatePods) -> int:
    """Wait until all six agree, and both replicas have everything; returns the number of the primary.

    Sentinels promise nothing for a second failure before that: they may not know yet which replica is up to date.
    """

    def agreed() -> bool:
        found = primary(pods)
        if found is None:
            return False
        position, replicas = ask(pods, found, "ROLE")[1:]  # type: ignore[index]
        same = all(int(replica[2]) == position for replica in replicas) and len(replicas) == 2
        return same and all(known(pods, n) == (pods.host("state", found), 2, 2, 2) for n in range(3))

    await until(agreed)
    found = primary(pods)
    assert found is not None
    return found


async def test_six_pods_that_start_at_once_agree_on_the_first_primary(pods: StatePods, tmp_path: Path) -> None:
    async with store_of(pods, tmp_path) as store:
        await until_it_answers(store)
        assert await settled(pods) == 0


async def test_the_rights_of_the_manifest_are_what_easel_needs_and_no_more(pods: StatePods, tmp_path: Path) -> None:
    async with store_of(pods, tmp_path) as store:
        await until_it_answers(store)
        placement = await running(store, "rights")
        await commit(store, "rights", placement.epoch, 0)
        assert (await store.cancel("rights")) is not None
        await store.view()
        state = StateSettings(url=pods.url, username="easel", password_file=str(tmp_path / "password"))
        client = connect_to(state)
        bell = Doorbell(client, namespace="easel")
        await bell.start("router-1")
        await bell.close()
        await client.aclose()
    easel = {"user": "easel", "password": SECRETS["PASSWORD"]}
    for words in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["GET", "another"], ["ACL", "LIST"]):
        with pytest.raises(redis.exceptions.NoPermissionError):
            ask(pods, 0, *words, **easel)
    with pytest.raises(redis.exceptions.AuthenticationError):
        ask(pods, 0, "PING", user="default", password=SECRETS["PASSWORD"])


async def test_a_job_outlives_the_primary_which_comes_back_as_a_replica(pods: StatePods, tmp_path: Path) -> None:
    async with store_of(pods, tmp_path) as store:
        await until_it_answers(store)
        await running(store, "outlives")
        assert await settled(pods) == 0
        pods.kill("state", 0)
        await until(lambda: "master" in (role(pods, 1), role(pods, 2)))
        await until_it_answers(store)
        assert (await store.placement("outlives")) is not None
        await store.cancel("outlives")
        pods.start("state", 0)
        await until(lambda: role(pods, 0) == "slave")


async def test_a_primary_without_its_data_waits_while_others_have_it(pods: StatePods, tmp_path: Path) -> None:
    """Sentinels still name it, if it comes back within seconds; its replicas would copy the emptiness."""
    async with store_of(pods, tmp_path) as store:
        await until_it_answers(store)
        await running(store, "precious")
        first = await settled(pods)
        pods.kill("state", first)
        shutil.rmtree(pods.data("state", first))
        output = pods.start("state", first)
        await until(lambda: role(pods, first) == "slave")
        await until_it_answers(store)
        assert (await store.placement("precious")) is not None
        assert "waiting to be replaced" in output.read_text()
