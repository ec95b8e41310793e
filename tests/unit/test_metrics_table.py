"""The table of metrics, and everything that names them: documentation, dashboard, alerts, and Ray's recorder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.metrics import easel_lines
from cluster.core import Priority
from cluster.jobs.states import AttemptEnd
from cluster.policy.ordering import OLDEST
from cluster.telemetry.metrics import LABELS, LEVELS, METRICS, Kind, Metric, exported

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "k8s" / "base" / "monitoring"
DASHBOARD = json.loads((MONITORING / "easel-dashboard.json").read_text())
RULES = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())
BASE_UNITS = ("_seconds", "_total", "_jobs", "_slots", "_canvases", "_pages", "_streams", "_replicas", "_routers")
# What Prometheus and Ray put on every series beside the labels of the table.
GIVEN_LABELS = {"namespace", "WorkerId", "le"}
SERIES = {series: metric for metric in METRICS for series in exported(metric)}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["spec"]["groups"] for rule in group["rules"]]


EXPRESSIONS = [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in rules()]


def metric_problems(expression: str) -> Iterator[str]:
    """Names that are no series of the table, and labels that their metrics do not have."""
    found: list[Metric] = []
    for name, selector in re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression):
        if name not in SERIES:
            yield f"{name} is no metric"
            continue
        found.append(SERIES[name])
        matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        yield from (f"{name} has no label {label}" for label in matched - GIVEN_LABELS - set(SERIES[name].labels))
    for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        labels = {label.strip() for label in grouping.split(",")} - GIVEN_LABELS
        had = {label for metric in found for label in metric.labels}
        yield from (f"nothing in it has the label {label}" for label in labels - had)
    if not found:
        yield "it names no metric of Easel"


def test_every_name_says_what_it_counts_and_counters_end_as_prometheus_wants() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"easel_[a-z_]+", metric.name)
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.name.endswith(BASE_UNITS) or metric.name == "easel_steps_per_canvas"


def test_bounds_belong_to_histograms_and_rise() -> None:
    for metric in METRICS:
        assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.bounds) == sorted(set(metric.bounds))


def test_every_label_is_bounded_and_none_names_a_job_or_a_tenant() -> None:
    used = {label for metric in METRICS for label in metric.labels}
    assert used == set(LABELS)
    assert not used & {"job_id", "job", "tenant", "request_id", "instance"}


def test_every_level_of_the_queue_has_a_name() -> None:
    assert set(LEVELS) == {*map(int, Priority), OLDEST}
    assert len(set(LEVELS.values())) == len(LEVELS)


def test_the_documentation_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(easel_\w+)` \| (\w+) \| (.*?) \| .*? \| (.*) \|$", docs(), re.MULTILINE)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    table = {metric.name: (metric.kind.value, metric.labels, metric.help.removesuffix(".")) for metric in METRICS}
    assert told == table
    labels = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", docs(), re.MULTILINE))
    assert labels == LABELS


def test_every_metric_that_the_documentation_names_exists() -> None:
    named = set(re.findall(r"\beasel_[a-z_]+\b", docs()))
    assert named <= {metric.name for metric in METRICS}


def docs() -> str:
    return (ROOT / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_and_alerts_use_only_metrics_and_labels_that_exist(expression: str) -> None:
    assert not list(metric_problems(expression))


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(ray_easel_token_total)",
        "sum(easel_tokens_total)",
        'sum(ray_easel_tokens_total{tenant="a"})',
        "sum by (reason) (rate(ray_easel_tokens_total[5m]))",
        "rate(ray_easel_queue_wait_seconds[5m])",
    ],
)
def test_a_planted_mistake_in_an_expression_is_found(wrong: str) -> None:
    assert list(metric_problems(wrong))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {SERIES[name].name for name in re.findall(r"\bray_easel_\w+", " ".join(EXPRESSIONS)) if name in SERIES}
    assert shown == {metric.name for metric in METRICS}


def test_expressions_name_only_reasons_operations_and_priorities_that_there_are() -> None:
    known = {
        "reason": {str(end) for end in AttemptEnd},
        "priority": set(LEVELS.values()),
        "state": {"ready", "draining", "used", "free"},
    }
    for expression in EXPRESSIONS:
        for label, values in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)"([^"]*)"', expression):
            assert label not in known or set(values.split("|")) <= known[label], expression


def test_panels_have_their_own_ids_and_places_and_a_legend_from_labels_of_their_expression() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    for panel in panels():
        assert {target["refId"] for target in panel["targets"]}
        for target in panel["targets"]:
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = {
                part.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for part in group.split(",")
            }
            assert legend <= grouped, panel["title"]
            assert 'namespace="$namespace"' in target["expr"]


def test_alerts_are_complete_and_named_once() -> None:
    assert RULES["kind"] == "PrometheusRule"
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert {"summary", "description"} == set(rule["annotations"])
        assert re.fullmatch(r"\d+m", rule["for"])


SCRAPED = """\
# HELP ray_easel_slots Jobs that a replica may run at once.
# TYPE ray_easel_slots gauge
ray_easel_slots{Component="core_worker",WorkerId="7b3626d5aa",otel_scope_name="ray",replica="denoiser-0"} 1.0
ray_easel_redis_seconds_bucket{WorkerId="7b3626d5aa",le="0.01",op="submit+assign",otel_scope_version=""} 3.0
ray_object_store_memory{WorkerId="7b3626d5aa"} 5.0
"""


def test_the_command_shows_easels_lines_with_the_labels_that_matter() -> None:
    assert list(easel_lines(SCRAPED, raw=False)) == [
        'ray_easel_slots{replica="denoiser-0",worker="7b3626d5"} 1.0',
        'ray_easel_redis_seconds_bucket{le="0.01",op="submit+assign",worker="7b3626d5"} 3.0',
    ]


def test_the_command_can_show_them_as_they_are() -> None:
    assert list(easel_lines(SCRAPED, raw=True)) == SCRAPED.splitlines()[:-1]
