"""Deploys the application on a Ray cluster that runs already, as a platform's pipeline would.

python -m tests.e2e.deploy RAY_ADDRESS SETTINGS_FILE
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ray
from ray import serve

from cluster.config import load_values
from deployments.app import build
from deployments.local import APP_NAME


def main() -> None:
    address, settings = sys.argv[1:]
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    serve.run(build(load_values(Path(settings))), name=APP_NAME, route_prefix=None)
    ray.shutdown()


if __name__ == "__main__":
    main()
