"""Spans without a library: what the rest of Easel knows of traces.

    the caller's span
      └ call (router)                 one for each call that starts a job
         └ job (router)               from submit to the end, whichever router sees it
            └ attempt (router)        one for each assignment
               └ denoise (replica)    the same run, seen from inside
                  └ canvas (replica)  with its denoising steps as attributes, or also as events

A parent is a W3C traceparent (https://www.w3.org/TR/trace-context/), as text: it travels in gRPC metadata and stays
with the job in Redis, so that a retry or another router goes on in the same trace.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

Attribute: TypeAlias = "str | int | float | bool"
Attributes = Mapping[str, Attribute]
Kind = Literal["server", "client", "internal"]

METADATA_KEY = "traceparent"
_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

# The span under which a call is being answered, as a traceparent; "" when there is none. Each call has its own context.
call_traceparent: ContextVar[str] = ContextVar("call_traceparent", default="")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A span as others name it: 32 and 16 hexadecimal digits, and whether its trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parse_traceparent(text: str) -> TraceParent | None:
    """What a traceparent says; None for what is none: a caller's bad header must not fail its call."""
    found = _FORM.fullmatch(text)
    if found is None or text.startswith("ff") or (text.startswith("00") and found[4]):
        return None
    trace_id, span_id = found[1], found[2]
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceParent(trace_id, span_id, sampled=bool(int(found[3], 16) & 1))


def traceparent_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The valid traceparent among gRPC metadata, or ""."""
    for key, value in metadata or ():
        if key == METADATA_KEY and isinstance(value, str):
            return value if parse_traceparent(value) else ""
    return ""


def job_span(traceparent: str, job_id: str) -> str:
    """The traceparent of a job's own span, known before that span is written; "" for a job without a trace.

    Derived, so that every router and replica agrees on it: whichever router sees the end writes the span.
    """
    parent = parse_traceparent(traceparent)
    if parent is None:
        return ""
    digest = hashlib.sha256(f"{parent.trace_id} {job_id}".encode()).hexdigest()
    return str(replace(parent, span_id=digest[:16]))


class Span(Protocol):
    """Something that takes time. `traceparent` names it to others; "" when it is not recorded."""

    @property
    def traceparent(self) -> str:
        """As text; see the module."""

    def event(self, name: str, attributes: Attributes) -> None:
        """Something that happened in it now."""

    def end(self, *, error: str | None = None, attributes: Attributes | None = None) -> None:
        """It is over now; with `error` it failed. Later calls change nothing."""


class Tracer(Protocol):
    """Makes spans, for use in one event loop. Never blocks and raises nothing: a trace must not cost a job."""

    def start(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = "internal",
        attributes: Attributes | None = None,
        started_ns: int | None = None,
        as_span: str = "",
    ) -> Span:
        """Begin a span under `parent` (a traceparent, "" for a new trace), now or at `started_ns` (Unix time).

        `as_span` is the traceparent by which others know it already, where that was agreed on before.
        """

    def close(self, timeout_s: float) -> None:
        """Send what is left, within the bound; the rest is dropped. Blocks; may be called twice."""


class Unwritten:
    """A span that is not recorded."""

    traceparent = ""

    def event(self, name: str, attributes: Attributes) -> None:
        """Nothing."""

    def end(self, *, error: str | None = None, attributes: Attributes | None = None) -> None:
        """Nothing."""


class Untraced:
    """A tracer that makes no span: traces are off."""

    def start(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = "internal",
        attributes: Attributes | None = None,
        started_ns: int | None = None,
        as_span: str = "",
    ) -> Span:
        """None."""
        return Unwritten()

    def close(self, timeout_s: float) -> None:
        """Nothing."""
