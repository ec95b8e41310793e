"""A replica across two Ray nodes: real raylets with addresses of their own, and the link between them is cut."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster import __version__
from cluster.client import Answer, EaselClient, RequestOptions
from cluster.errors import Unavailable
from cluster.redis_server import find_redis_server
from tests.e2e.conftest import CHECKPOINT, until
from tests.e2e.nodes import RAY_PORT, Namespaces, NotPermitted, ray_node
from tests.e2e.test_cluster import PROMISED, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

JOBS = 8
START_S = 90.0
OTHER_VERSION = "9.9.9"
ASK_S = 3.0
# Ray's own bound on a node that does not answer, and the replica's on a step, both short for the test.
RAY_BOUNDS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
SETTINGS: dict[str, Any] = {
    "checkpoint": str(CHECKPOINT),
    "state": {"lease_ms": 3000, "heartbeat_ms": 500},
    # Only the head has room for it.
    "router": {"host": "0.0.0.0", "num_cpus": 2},
    "denoiser": {"replicas": 1, "tp": 2, "placement": "strict_spread", "host": "0.0.0.0", "step_timeout_s": 4.0},
}
LONG: RequestOptions = {"confidence_threshold": 1e-6, "max_denoising_steps": 48, "max_new_tokens": 96}


@dataclass(frozen=True)
class Nodes:
    """Two Ray nodes, Redis and a router on the head, one replica with a rank on each."""

    spaces: Namespaces
    folder: Path

    @property
    def address(self) -> str:
        """The router, as this process reaches it whether the nodes are joined or not."""
        return f"{self.spaces.outer_host}:8500"

    def start_far(self, source: Path = ROOT) -> None:
        """The far node, with Easel as it is in the folder `source`."""
        spaces = self.spaces
        spaces.end_processes(spaces.far)
        node = ray_node(spaces.far_host, spaces.head_host, cpus=1, folder=self.folder)
        spaces.run(spaces.far, "env", f"PYTHONPATH={source}", *node, timeout_s=START_S)

    def runs_on_far(self) -> list[str]:
        """What runs on the far node, as command lines. Ray's log monitor ends with its node only by hand."""
        titles = []
        for pid in self.spaces.processes(self.spaces.far):
            with suppress(psutil.Error):
                titles.append(" ".join(psutil.Process(pid).cmdline()))
        return [title for title in titles if title and "log_monitor.py" not in title]

    def start_head(self) -> None:
        """Redis and the head's Ray node."""
        spaces, head = self.spaces, self.spaces.head
        redis = [str(find_redis_server()), "--bind", "0.0.0.0", "--port", "6400", "--protected-mode", "no"]
        spaces.start(head, *redis, "--save", "", "--dir", str(self.folder))
        spaces.run(head, *ray_node(spaces.head_host, spaces.head_host, cpus=3, folder=self.folder), timeout_s=START_S)

    def deploy(self) -> list[str]:
        """The command that deploys Easel, to be run on the head."""
        values = {**SETTINGS, "state": {**SETTINGS["state"], "url": f"redis://{self.spaces.head_host}:6400/0"}}
        file = self.folder / "easel.yaml"
        file.write_text(json.dumps(values))
        # Ray puts the folder it is called from before what a node has by itself.
        python = ["env", "-C", str(self.folder), sys.executable]
        return [*python, "-m", "tests.e2e.deploy", f"{self.spaces.head_host}:{RAY_PORT}", str(file)]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    environment = os.environ | RAY_BOUNDS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray's sockets lie there, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="easel-ray-"))
    try:
        with closing(Namespaces(environment | {"PYTHONPATH": str(ROOT)})) as spaces:
            made = Nodes(spaces, folder)
            made.start_head()
            yield made
    except NotPermitted as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def test_jobs_survive_a_cut_between_the_nodes_of_their_replica(nodes: Nodes) -> None:
    nodes.start_far()
    nodes.spaces.run(nodes.spaces.head, *nodes.deploy(), timeout_s=START_S)
    async with EaselClient(nodes.address) as client:
        await until(lambda: serves(client), START_S)
        for prompt, answer in list(PROMISED.items())[:2]:
            assert (await client.generate(prompt, seed=1)).text == answer
        expected = [answer.token_ids for answer in await asyncio.gather(*long_answers(client))]
        before = (await client.status()).replicas[0]
        asked = [asyncio.ensure_future(answer) for answer in long_answers(client)]
        await until(lambda: runs(client, before.stats["canvas_steps"] + JOBS))

        nodes.spaces.cut()
        await until(lambda: waits(client), START_S)
        await until(lambda: not_serving(nodes.address))
        # The far node was given up meanwhile. Joined again it learns of it, and ends all that it ran.
        nodes.spaces.mend()
        await until(lambda: not nodes.runs_on_far(), START_S)
        nodes.start_far()

        answers = await asyncio.wait_for(asyncio.gather(*asked), START_S)
        assert [answer.token_ids for answer in answers] == expected
        assert max(answer.usage.attempts for answer in answers) > 1
        after = await client.status()
        assert [row.stats["ranks"] for row in after.replicas] == [2]
        assert not after.pending


async def test_another_version_on_one_node_is_told_with_both_versions(nodes: Nodes) -> None:
    nodes.start_far(another_version(nodes.folder / "other"))
    nodes.spaces.start(nodes.spaces.head, *nodes.deploy())
    said = f"Easel is {OTHER_VERSION} on its node {nodes.spaces.far_host} and {__version__} on that of rank 0"
    await until(lambda: tells(nodes.address, said), START_S)
    assert await not_serving(nodes.address)


def another_version(folder: Path) -> Path:
    """A copy of Easel that says it is of another version."""
    for package in ("cluster", "deployments"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cluster" / "__init__.py").write_text(f'__version__ = "{OTHER_VERSION}"\n')
    return folder


async def tells(address: str, said: str) -> bool:
    # A client of its own each time: one that finds no router waits longer and longer before it looks again.
    try:
        async with asyncio.timeout(ASK_S), EaselClient(address) as client:
            return any(said in line for line in (await client.status()).pending)
    except (TimeoutError, Unavailable):
        return False  # the router is being started


async def not_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs leave the methods out
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)


def long_answers(client: EaselClient) -> list[Coroutine[Any, Any, Answer]]:
    each: list[RequestOptions] = [{**LONG, "seed": seed} for seed in range(JOBS)]
    return [client.generate(tokens=list(range(5, 25)), **options) for options in each]


async def serves(client: EaselClient) -> bool:
    return len((await client.status()).replicas) == 1


async def runs(client: EaselClient, canvas_steps: float) -> bool:
    view = await client.status()
    return view.active == JOBS and view.replicas[0].stats["canvas_steps"] >= canvas_steps


async def waits(client: EaselClient) -> bool:
    """The replica has no place any more, and the status says what it waits for."""
    pending = (await client.status()).pending
    return bool(pending) and "2 x {CPU: 1}, each on another node; the cluster has 1 node with {CPU: 3}" in pending[0]
