"""Trace contexts, and traces that cannot be had."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider

from cluster.config import TraceSettings, parse_settings
from cluster.errors import ConfigError
from cluster.telemetry.caller import trace_metadata
from cluster.telemetry.recorder import Unrecorded
from cluster.telemetry.telemetry import make_telemetry
from cluster.telemetry.tracing import Untraced, job_span, parse_traceparent, traceparent_in

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_traceparent_is_read_and_written_alike() -> None:
    parent = parse_traceparent(GOOD)
    assert parent is not None
    assert (parent.trace_id, parent.span_id, parent.sampled) == (TRACE, SPAN, True)
    assert str(parent) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        *("", "hello", GOOD.upper(), GOOD[:-1], f"{GOOD}-extra", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-0x"),
        *(f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f" {GOOD}"),
    ],
)
def test_what_is_no_traceparent_is_left_out(text: str) -> None:
    assert parse_traceparent(text) is None
    assert traceparent_in([("traceparent", text)]) == ""
    assert job_span(text, "job") == ""


def test_a_later_version_may_say_more() -> None:
    parent = parse_traceparent(f"01-{TRACE}-{SPAN}-00-what-comes-later")
    assert parent is not None
    assert not parent.sampled


def test_metadata_without_a_traceparent_has_none() -> None:
    assert traceparent_in(None) == traceparent_in([("user-agent", "x"), ("traceparent", b"bytes")]) == ""
    assert traceparent_in([("user-agent", "x"), ("traceparent", GOOD)]) == GOOD


def test_the_span_of_a_job_is_the_same_for_whoever_asks_and_another_for_another_job() -> None:
    named = parse_traceparent(job_span(GOOD, "a"))
    assert named is not None
    assert (named.trace_id, named.sampled) == (TRACE, True)
    assert named.span_id != SPAN
    assert job_span(GOOD, "a") == job_span(GOOD, "a") != job_span(GOOD, "b")


def test_the_client_sends_the_callers_active_span_and_nothing_without_one() -> None:
    assert trace_metadata() == ()
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("test").start_as_current_span("work") as span:
        ((key, value),) = trace_metadata()
    named = parse_traceparent(value)
    assert key == "traceparent"
    assert named is not None
    assert int(named.span_id, 16) == span.get_span_context().span_id


def test_traces_are_off_by_default() -> None:
    settings = parse_settings({"checkpoint": "models/tiny"})
    telemetry = make_telemetry(settings.telemetry.traces, Unrecorded(), process="router-0", service="easel-router")
    assert isinstance(telemetry.tracer, Untraced)


def test_traces_without_the_library_are_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cluster.telemetry.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"telemetry\.traces\.enabled: .*pip install 'easel\[otel\]'"):
        make_telemetry(TraceSettings(enabled=True), Unrecorded(), process="router-0", service="easel-router")


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "ftp://collector:4317", "http://a b:1"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.traces\.endpoint"):
        parse_settings({"checkpoint": "x", "telemetry": {"traces": {"endpoint": endpoint}}})
