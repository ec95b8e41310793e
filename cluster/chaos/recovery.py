"""How long after a kill the streams that it hit go on elsewhere. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.chaos.schedule import KillKind
from cluster.chaos.transcript import Seen

_KILLS_AT_ONCE = (KillKind.REPLICA, KillKind.RANK)
# What a replica sent before it was killed has reached its readers after this long.
_ON_ITS_WAY_S = 0.25
# A stream whose last draft is older has none any more, so it does not tell which replica it is on.
_FRESH_S = 2.0


@dataclass(frozen=True, slots=True)
class Kill:
    """A strike that was made at `at_s` (monotonic). `replica` is "" where it hit no replica.

    `had_room` tells that the other replicas had a free slot for every job that it hit.
    """

    kind: KillKind
    at_s: float
    target: str
    replica: str = ""
    had_room: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """The time from a kill to a stream's next denoising step, or next canvas, from another replica.

    `is_clean` tells that this time has nothing else in it: the other replicas had a free slot for every job of the
    killed one, no job was seen waiting for a slot meanwhile, and no other strike came between.
    """

    ms: float
    is_clean: bool


def recoveries(
    kills: Sequence[Kill], timelines: Sequence[Sequence[Seen]], waited_at_s: Sequence[float] = ()
) -> Iterator[Recovery]:
    """One for each stream whose last draft before a SIGKILL came from the killed replica, and that went on.

    `waited_at_s` are the times at which a job was seen waiting for a slot.
    """
    disturbances_s = [*waited_at_s, *(kill.at_s for kill in kills)]
    for kill in kills:
        if kill.kind not in _KILLS_AT_ONCE:
            continue
        for timeline in timelines:
            seconds = _until_next_s(kill, timeline)
            if seconds is not None:
                alone = not any(kill.at_s < at_s <= kill.at_s + seconds for at_s in disturbances_s)
                yield Recovery(seconds * 1000, is_clean=kill.had_room and alone)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _until_next_s(kill: Kill, timeline: Sequence[Seen]) -> float | None:
    after = bisect_right(timeline, kill.at_s, key=lambda seen: seen.at_s)
    drafts = (seen for seen in reversed(timeline[:after]) if seen.replica)
    last = next(drafts, None)
    if last is None or last.replica != kill.replica or kill.at_s - last.at_s > _FRESH_S:
        return None
    following = next((seen for seen in timeline[after:] if _is_elsewhere(seen, kill)), None)
    return None if following is None else following.at_s - kill.at_s


def _is_elsewhere(seen: Seen, kill: Kill) -> bool:
    """True for what cannot come from the killed replica any more; a canvas does not say where it was made."""
    return seen.replica != kill.replica if seen.replica else seen.at_s > kill.at_s + _ON_ITS_WAY_S
