"""What a process is given to tell about itself, and how the composition root makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import TraceSettings
from cluster.telemetry.recorder import Recorder, Unrecorded
from cluster.telemetry.tracing import Tracer, Untraced

# The last spans of a process that leaves have this long to go out.
FLUSH_S = 2.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Metrics and traces of one process; by default neither goes anywhere. `steps`: spans show every denoising step."""

    recorder: Recorder = field(default_factory=Unrecorded)
    tracer: Tracer = field(default_factory=Untraced)
    steps: bool = False


def make_telemetry(traces: TraceSettings, recorder: Recorder, *, process: str, service: str) -> Telemetry:
    """As the settings say, for a process with a name. Raises ConfigError when what traces need is not installed."""
    if not traces.enabled:
        return Telemetry(recorder)
    from cluster.telemetry.otel import make_tracer  # noqa: PLC0415 - only who traces needs the library

    return Telemetry(recorder, make_tracer(traces, process=process, service=service), traces.steps)
