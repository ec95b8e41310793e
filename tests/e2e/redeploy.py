"""Redeploys the local cluster's application from another process, as a platform team's pipeline would.

    python -m tests.e2e.redeploy HOME LOG_LEVEL ROUTERS

Serve replaces every replica of a deployment whose arguments changed, a few at a time.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import ray
from ray import serve

from deployments.app import build
from deployments.local import APP_NAME


def main() -> None:
    home, log_level, routers = sys.argv[1:]
    record = json.loads((Path(home) / "local.json").read_text())
    settings = {
        "checkpoint": record["checkpoint"],
        "log_level": log_level,
        "state": {"url": record["redis_url"]},
        "router": {"port": int(record["address"].rpartition(":")[2]), "replicas": int(routers)},
        "denoiser": {"replicas": 2},
    }
    ray.init(address=record["ray_address"], logging_level=logging.ERROR, log_to_driver=False)
    serve.run(build(settings), name=APP_NAME, route_prefix=None)
    ray.shutdown()


if __name__ == "__main__":
    main()
