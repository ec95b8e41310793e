"""The trace of whoever uses the Python client, if they trace at all."""

from __future__ import annotations

from cluster.telemetry.tracing import METADATA_KEY, TraceParent

try:
    from opentelemetry import trace
except ModuleNotFoundError:
    HAS_API = False
else:
    HAS_API = True


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """gRPC metadata that names the caller's active OpenTelemetry span; empty without one, or without the library."""
    if not HAS_API:
        return ()
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ()
    sampled = context.trace_flags.sampled
    named = TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}", sampled=sampled)
    return ((METADATA_KEY, str(named)),)
