"""The states of a job and the moves between them; a test holds the Lua files to this table.

submit            assign            finish
──────>  QUEUED  ───────>  RUNNING  ──────>  SUCCEEDED
          │  ^              │  ^ │
          │  └──────────────┤  └─┘ commit, checkpoint
          │  release, reap  │
          └─────────────────┴──> FAILED (fail; release or reap after too many losses), CANCELLED (cancel)
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from cluster.errors import TransitionError


class JobState(StrEnum):
    """Where a job stands; stored in Redis as this word, never inferred."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """True when nothing can change the job any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Action(StrEnum):
    """What can happen to a job."""

    submit = "submit"
    assign = "assign"
    commit = "commit"
    checkpoint = "checkpoint"
    finish = "finish"
    fail = "fail"
    cancel = "cancel"
    release = "release"
    reap = "reap"


class AttemptEnd(StrEnum):
    """Why a run on a replica ended before its job did. The word is stored in the job's history."""

    PREEMPTED = "PREEMPTED"
    DRAINED = "DRAINED"
    ROUTER_LOST = "ROUTER_LOST"
    UNCLAIMED = "UNCLAIMED"
    ENGINE = "ENGINE"
    STEP_HUNG = "STEP_HUNG"
    REPLICA_LOST = "REPLICA_LOST"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    LOST_WRITES = "LOST_WRITES"

    @property
    def is_loss(self) -> bool:
        """True when the job may be to blame: only so many of these in a row, without a new canvas, are forgiven."""
        return self not in (AttemptEnd.PREEMPTED, AttemptEnd.DRAINED, AttemptEnd.ROUTER_LOST)


TRANSITIONS: Mapping[tuple[JobState | None, Action], JobState] = MappingProxyType(
    {
        (None, Action.submit): JobState.QUEUED,
        (JobState.QUEUED, Action.assign): JobState.RUNNING,
        (JobState.QUEUED, Action.fail): JobState.FAILED,
        (JobState.QUEUED, Action.cancel): JobState.CANCELLED,
        (JobState.RUNNING, Action.commit): JobState.RUNNING,
        (JobState.RUNNING, Action.checkpoint): JobState.RUNNING,
        (JobState.RUNNING, Action.finish): JobState.SUCCEEDED,
        (JobState.RUNNING, Action.fail): JobState.FAILED,
        (JobState.RUNNING, Action.cancel): JobState.CANCELLED,
        (JobState.RUNNING, Action.release): JobState.QUEUED,
        (JobState.RUNNING, Action.reap): JobState.QUEUED,
    }
)


def next_state(state: JobState | None, action: Action) -> JobState:
    """The state after `action`; `None` stands for a job that does not exist yet.

    Raises TransitionError for a move that the table does not have.
    """
    try:
        return TRANSITIONS[state, action]
    except KeyError:
        known = "unknown" if state is None else state.value
        raise TransitionError(f"a job that is {known} has no move '{action.value}'") from None
