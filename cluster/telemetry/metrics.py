"""Every metric of Easel, in one table: name, kind, help, labels and, for a histogram, its bounds.

Names say their unit, in Prometheus' base units. Ray's agent exports each of them as `exported(metric)`. A label never
holds a job id or a tenant: the values of each one are in LABELS, or are the names of the processes of the moment.
docs/metrics.md has the same table for people; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.core import Priority
from cluster.policy.ordering import OLDEST

RAY_PREFIX = "ray_"


class Kind(StrEnum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `bounds` are the upper bounds of a histogram's buckets, in the unit that its name says."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


# How a level of the queue is called; a job that has waited long can be above every priority.
LEVELS = {**{int(priority): priority.name.lower() for priority in Priority}, OLDEST: "oldest"}

LABELS = {
    "priority": "batch, normal, high or urgent; in the queue also oldest: above all of them by waiting",
    "state": "of replicas ready or draining, of pages used or free",
    "replica": "name of a replica that lives",
    "method": "a method of the public contract, as Generate; unknown where a refused call names none",
    "code": "gRPC status as its word, as OK or UNAVAILABLE",
    "outcome": "succeeded, cancelled, or the reason of the failure, as DEADLINE_EXCEEDED",
    "reason": "why the run before ended: a word of AttemptEnd, as REPLICA_LOST",
    "op": "a Lua script of cluster/jobs/lua, scripts of one round trip joined by +, or a read as placement",
}

_WAITS_S = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_REDIS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_STEPS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
_FAILOVERS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_STEPS_PER_CANVAS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0, 40.0, 44.0, 47.0, 48.0, 64.0, 128.0)

# The cluster's state: every router says it once a heartbeat, and all say the same. Take max over them, never sum.
QUEUE_JOBS = Metric("easel_queue_jobs", Kind.GAUGE, "Jobs that wait for a slot, by their level.", ("priority",))
REPLICAS = Metric("easel_replicas", Kind.GAUGE, "Denoiser replicas with a lease.", ("state",))
ROUTERS = Metric("easel_routers", Kind.GAUGE, "Routers with a lease.")

# Routers.
OPEN_STREAMS = Metric("easel_open_streams", Kind.GAUGE, "Calls that this router is answering.", ("method",))
CALLS = Metric("easel_calls_total", Kind.COUNTER, "Calls that ended, by status.", ("method", "code"))
QUEUE_WAIT = Metric(
    "easel_queue_wait_seconds", Kind.HISTOGRAM, "From submit to the first assignment.", ("priority",), _WAITS_S
)
JOBS = Metric("easel_jobs_total", Kind.COUNTER, "Jobs that ended.", ("outcome",))
JOB_DURATION = Metric("easel_job_seconds", Kind.HISTOGRAM, "From submit to the end.", ("outcome",), _WAITS_S)

# Replicas.
SLOTS = Metric("easel_slots", Kind.GAUGE, "Jobs that a replica may run at once.", ("replica",))
FREE_SLOTS = Metric("easel_free_slots", Kind.GAUGE, "Slots without a job.", ("replica",))
ACTIVE_CANVASES = Metric("easel_active_canvases", Kind.GAUGE, "Jobs in the engine, one canvas each.", ("replica",))
PREEMPTING_JOBS = Metric("easel_preempting_jobs", Kind.GAUGE, "Jobs told to give way that still run.", ("replica",))
KV_PAGES = Metric("easel_kv_pages", Kind.GAUGE, "Pages of the KV cache, of rank 0.", ("replica", "state"))
STEP_DURATION = Metric("easel_step_seconds", Kind.HISTOGRAM, "One denoising step over all jobs.", (), _STEPS_S)
STEPS = Metric("easel_denoising_steps_total", Kind.COUNTER, "Denoising steps of the engine, each over all jobs.")
CANVAS_STEPS = Metric("easel_canvas_steps_total", Kind.COUNTER, "Denoising steps, counted once for each canvas in it.")
PREFILL_TOKENS = Metric("easel_prefill_tokens_total", Kind.COUNTER, "Context that was computed.")
PREFIX_LOOKUP_TOKENS = Metric("easel_prefix_lookup_tokens_total", Kind.COUNTER, "Context that jobs came with.")
PREFIX_HIT_TOKENS = Metric("easel_prefix_hit_tokens_total", Kind.COUNTER, "Context found in the cache.")
COMMITS = Metric("easel_commits_total", Kind.COUNTER, "Canvases committed to Redis.")
TOKENS = Metric("easel_tokens_total", Kind.COUNTER, "Answer tokens in committed canvases.")
STEPS_PER_CANVAS = Metric(
    "easel_steps_per_canvas", Kind.HISTOGRAM, "Denoising steps of a committed canvas.", (), _STEPS_PER_CANVAS
)
RETRIES = Metric("easel_retries_total", Kind.COUNTER, "Runs that go on where one was lost.", ("reason",))
PREEMPTIONS = Metric("easel_preemptions_total", Kind.COUNTER, "Runs that go on where one gave way to an urgent job.")
DRAINED_JOBS = Metric("easel_drained_jobs_total", Kind.COUNTER, "Runs that go on where a replica drained.")
DRAINS = Metric("easel_drains_total", Kind.COUNTER, "Drains of replicas that began.")
FAILOVER = Metric(
    "easel_failover_seconds",
    Kind.HISTOGRAM,
    "From the end of a run, as Redis heard of it, to the job's next step elsewhere.",
    ("reason",),
    _FAILOVERS_S,
)

# Both.
REDIS = Metric("easel_redis_seconds", Kind.HISTOGRAM, "One round trip to Redis.", ("op",), _REDIS_S)
REDIS_ERRORS = Metric("easel_redis_errors_total", Kind.COUNTER, "Round trips that found no usable Redis.", ("op",))

METRICS = (
    *(QUEUE_JOBS, REPLICAS, ROUTERS, OPEN_STREAMS, CALLS, QUEUE_WAIT, JOBS, JOB_DURATION),
    *(SLOTS, FREE_SLOTS, ACTIVE_CANVASES, PREEMPTING_JOBS, KV_PAGES, STEP_DURATION, STEPS, CANVAS_STEPS),
    *(PREFILL_TOKENS, PREFIX_LOOKUP_TOKENS, PREFIX_HIT_TOKENS, COMMITS, TOKENS, STEPS_PER_CANVAS),
    *(RETRIES, PREEMPTIONS, DRAINED_JOBS, DRAINS, FAILOVER, REDIS, REDIS_ERRORS),
)


def exported(metric: Metric) -> tuple[str, ...]:
    """The names of its time series as Ray's agent exports them."""
    name = RAY_PREFIX + metric.name
    if metric.kind is Kind.HISTOGRAM:
        return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
    return (name,)
