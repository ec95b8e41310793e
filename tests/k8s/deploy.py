"""Deploys the Serve config of the CPU overlay as KubeRay does, on Ray nodes that have the labels of its groups.

python -m tests.k8s.deploy FOLDER. Prints one JSON object: on which roles' nodes the replicas run, what the health port
says, and what a job ended with. Ray runs in this process's session; whoever starts it bounds it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.client import EaselClient
from cluster.config import overlay
from cluster.redis_server import RedisServer, free_port
from deployments.router import READINESS
from tests.k8s.view import View, render_overlay

BOUND_S = 120.0
STORE_BYTES = 80_000_000
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """See the top."""
    view = View(render_overlay("cpu"))
    redis = RedisServer(Path(sys.argv[1]) / "redis")
    redis.start()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    for group in view.groups:
        # One node more than there are routers: the label decides where they run, not the room.
        for _ in range(2):
            nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES, labels=group["labels"])
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        config, ports = _config(view, redis.url)
        serve.start(proxy_location="Disabled")
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config))
        _until_running()
        print(json.dumps({"roles": _roles(), "ready": _ready(ports["health_port"]), "job": _job(ports["port"])}))
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()
        redis.stop()


def _config(view: View, redis_url: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The overlay's, with two routers, and the places of this machine instead of those of pods."""
    application = view.serve["applications"][0]
    ports = {"port": free_port(), "health_port": free_port()}
    state = {"url": redis_url}
    router = {**ports, "host": "127.0.0.1", "replicas": 1}
    here = {"checkpoint": str(ROOT / "models/tiny"), "router": router, "denoiser": {"host": "127.0.0.1", "replicas": 2}}
    arguments = overlay({**application["args"], "state": state}, here)
    return {**view.serve, "applications": [{**application, "args": arguments}]}, ports


def _until_running() -> None:
    give_up_s = time.monotonic() + BOUND_S
    while True:
        application = serve.status().applications.get("easel")
        if application is not None and application.status == "RUNNING":
            return
        failed = application is not None and application.status == "DEPLOY_FAILED"
        if failed or time.monotonic() > give_up_s:
            raise SystemExit(f"not running: {application}")
        time.sleep(0.5)


def _roles() -> dict[str, list[str]]:
    """Deployment -> the roles of the nodes on which its replicas run."""
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    found = defaultdict(list)
    for actor in actors().values():
        if actor["State"] == "ALIVE" and actor["ActorClassName"].startswith("ServeReplica:easel:"):
            name = actor["ActorClassName"].rpartition(":")[2]
            found[name].append(labels[actor["Address"]["NodeID"]].get("easel/role", ""))
    return dict(found)


def _ready(port: int) -> bool:
    """What the kubelet's probe asks, until it is so."""
    give_up_s = time.monotonic() + BOUND_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # ships no type information for its methods
        while time.monotonic() < give_up_s:
            answer = health.Check(health_pb2.HealthCheckRequest(service=READINESS), timeout=5.0, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return True
            time.sleep(0.2)
    return False


def _job(port: int) -> str:
    async def one() -> str:
        async with EaselClient(f"127.0.0.1:{port}") as client:
            return (await client.generate("sort 40718", seed=7)).text

    return asyncio.run(one())


if __name__ == "__main__":
    main()
