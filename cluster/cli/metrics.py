"""`easel metrics`: the numbers of the cluster on this machine, as Prometheus would scrape them."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import click

from cluster import embedded
from cluster.errors import Unavailable
from cluster.telemetry.metrics import LABELS, RAY_PREFIX

TIMEOUT_S = 5.0
PREFIX = f"{RAY_PREFIX}easel_"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)",?')


@click.command()
@click.option("--raw", is_flag=True, help="Every label, and the HELP and TYPE lines.")
def metrics(raw: bool) -> None:
    """Show what the cluster on this machine counts: Easel's lines of the endpoint of Ray's agent.

    Processes send what they counted every 10 seconds. docs/metrics.md tells what each name means.
    """
    cluster = embedded.current()
    if cluster is None or not cluster.metrics_address:
        raise Unavailable("no cluster runs on this machine; start one with `easel up`")
    url = f"http://{cluster.metrics_address}/metrics"
    for line in easel_lines(_scrape(url), raw=raw):
        click.echo(line)


def easel_lines(text: str, *, raw: bool) -> Iterator[str]:
    """Those of Easel's metrics; unless `raw`, without comments and with the labels of the table and the worker only."""
    for line in text.splitlines():
        if raw and line.startswith((PREFIX, f"# HELP {PREFIX}", f"# TYPE {PREFIX}")):
            yield line
        elif not raw and line.startswith(PREFIX):
            yield _short(line)


def _short(line: str) -> str:
    name, _, rest = line.partition("{")
    labels, _, value = rest.rpartition("} ")
    kept = [f'{key}="{text}"' for key, text in _LABEL.findall(labels) if key in LABELS or key == "le"]
    worker = [f'worker="{text[:8]}"' for key, text in _LABEL.findall(labels) if key == "WorkerId"]
    return f"{name}{{{','.join(kept + worker)}}} {value}"


def _scrape(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except OSError as error:
        raise Unavailable(f"Ray's agent does not answer at {url}: {error}") from None
