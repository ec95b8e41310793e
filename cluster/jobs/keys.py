"""Names of everything Easel keeps in Redis. All share the hash tag {namespace}: one slot of a Redis Cluster.

    {ns}:queue               ZSET    score 0, members of cluster.policy.ordering: the jobs that wait
    {ns}:replicas            ZSET    replica -> end of its lease, ms
    {ns}:routers             ZSET    router -> end of its lease, ms
    {ns}:jobs                ZSET    job -> arrival sequence: the index that `list` pages through
    {ns}:jobs:<tenant>       ZSET    the same for the jobs whose ids begin with "<tenant>/": its own
    {ns}:expiring            ZSET    ended job -> when its record is gone, ms
    {ns}:seq                 INT     counter of arrivals and of assignments
    {ns}:job:<job>           HASH    the record
    {ns}:canvases:<job>      STREAM  one entry per committed canvas, id <index + 1>-<epoch>, field c
    {ns}:waiting             ZSET    job that waits -> since when, or when it last gained a level, ms
    {ns}:victims             ZSET    score 0, members of cluster.policy.preemption: running jobs that may give way
    {ns}:marked              SET     running jobs that were told to give way
    {ns}:apart               HASH    running job whose next loss would be its last -> replica
    {ns}:pulse               HASH    heard_ms, grace_ms: whether leases can be believed
    {ns}:quotas              HASH    tenant, or "" for all others -> its limits, as lua/lib/quota.lua reads them
    {ns}:held                ZSET    waiting job that its tenant's quota keeps out of the queue -> its deadline, ms
    {ns}:held_of:<tenant>    ZSET    score 0, members of the queue's form: the same, in order
    {ns}:admitted:<tenant>   ZSET    score 0: the tenant's members in the queue
    {ns}:running_of:<tenant> SET     its running jobs; these three are kept for jobs that count against a quota
    {ns}:bucket:<tenant>     HASH    tokens, at_ms: requests a second
    {ns}:schema              STRING  version of these names and of what is behind them
    {ns}:checkpoint:<job>    HASH    version, canvas_index, step, payload: the canvas in progress
    {ns}:images:<job>        STRING  easel.internal.v1.JobImages of a job that brought images, until it ends
    {ns}:image_bytes         INT     bytes of all of these
    {ns}:owned:<router>      SET     jobs that have not ended and that this router has charge of
    {ns}:replica:<replica>   HASH    address, model, version, slots, stats, last_assigned_seq, draining,
                                     suspect (until then, ms), strikes
    {ns}:running:<replica>   HASH    job -> "<epoch>" or "<epoch> preempt"; its size is how many slots are taken
    {ns}:fresh:<replica>     SET     jobs it runs that have no canvas since they were assigned
    {ns}:bell:process:<name> channel of a router or a replica: "<kind> <job>"
    {ns}:bell:job:<job>      channel of a job: "<what happened>"

The kind of a key comes before the id, so that no id can spell another key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.core import Violation
from cluster.errors import ConfigError, InvalidRequest

# Raised when a new version cannot work with what an older one left, or the other way round.
SCHEMA = b"2"

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
# No spaces: a channel message is "<kind> <job>", and a queue member ends with the id.
_ID = re.compile(r"[!-~]{1,200}")


def checked_id(field: str, value: str) -> str:
    """`value` when it can name a job or a process; InvalidRequest with `field` otherwise."""
    if _ID.fullmatch(value):
        return value
    shown = value if len(value) <= 40 else value[:40] + "..."
    allowed = "1 to 200 printable ASCII characters without spaces are allowed"
    raise InvalidRequest([Violation(field, f"is {shown!r}; {allowed}")])


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds the names for one namespace. Raises ConfigError for a namespace that cannot be a hash tag."""

    namespace: str

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigError(f"redis namespace is {self.namespace!r}; allowed: 1 to 64 letters, digits, '.', '_', '-'")

    @property
    def base(self) -> str:
        """The hash tag, from which the scripts derive the names of rows that they pick themselves."""
        return f"{{{self.namespace}}}"

    @property
    def fixed(self) -> tuple[str, ...]:
        """The first KEYS of every script, in the order that lua/lib/names.lua expects."""
        first = ("queue", "replicas", "routers", "jobs", "expiring", "seq", "waiting")
        second = ("victims", "marked", "apart", "pulse")
        return (self.base, *(f"{self.base}:{name}" for name in (*first, *second)))

    @property
    def schema(self) -> str:
        return f"{self.base}:schema"

    @property
    def jobs(self) -> str:
        return f"{self.base}:jobs"

    @property
    def queue(self) -> str:
        return f"{self.base}:queue"

    @property
    def replicas(self) -> str:
        return f"{self.base}:replicas"

    @property
    def routers(self) -> str:
        return f"{self.base}:routers"

    def job(self, job_id: str) -> str:
        """The record of a job. Raises InvalidRequest for an id that no job can have."""
        return f"{self.base}:job:{checked_id('job_id', job_id)}"

    def canvases(self, job_id: str) -> str:
        """The committed canvases of a job. Raises InvalidRequest for an id that no job can have."""
        return f"{self.base}:canvases:{checked_id('job_id', job_id)}"

    def checkpoint(self, job_id: str) -> str:
        """The canvas in progress of a job. Raises InvalidRequest for an id that no job can have."""
        return f"{self.base}:checkpoint:{checked_id('job_id', job_id)}"

    def images(self, job_id: str) -> str:
        """The images of a job. Raises InvalidRequest for an id that no job can have."""
        return f"{self.base}:images:{checked_id('job_id', job_id)}"

    def replica(self, replica: str) -> str:
        """The slot row of a replica."""
        return f"{self.base}:replica:{checked_id('replica', replica)}"

    def running(self, replica: str) -> str:
        """The jobs that hold a replica's slots."""
        return f"{self.base}:running:{checked_id('replica', replica)}"

    def process_bell(self, name: str) -> str:
        """The channel of a router or replica."""
        return f"{self.base}:bell:process:{checked_id('name', name)}"

    def job_bell(self, job_id: str) -> str:
        """The channel of a job."""
        return f"{self.base}:bell:job:{checked_id('job_id', job_id)}"
