"""The jobs of a chaos run: what is asked, and how its client behaves. A pure function of (seed, index)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from cluster.chaos.prompts import endless_prompt, promised_prompt
from cluster.core import MAX_SEED, Priority
from cluster.rpc.prompts import RequestOptions

CANVAS_TOKENS = 32
# A canvas ends early once it is sure of itself; below this mean entropy, in nats, it practically never is.
NEVER_SURE_NATS = 1e-9
_SHORT_SHARE = 0.25
_ENDLESS_SHARE = 0.6


class Style(StrEnum):
    """How a client reads its job."""

    STREAM = "stream"
    """One stream with drafts, from the request to the end."""
    GENERATE = "generate"
    """One call, the whole answer."""
    WATCH = "watch"
    """Stored first, then watched with drafts."""
    RECONNECT = "reconnect"
    """Watched; the client disconnects in the middle, and another goes on from the next canvas."""
    REJOIN = "rejoin"
    """Watched; the client disconnects, and another makes the same request again under the same id."""
    CANCEL = "cancel"
    """Watched, and cancelled in the middle."""
    LEAVE = "leave"
    """Streamed; the client closes the stream in the middle, which stops the job."""

    @property
    def stops_early(self) -> bool:
        """True when the client itself asks for the job's end."""
        return self in (Style.CANCEL, Style.LEAVE)


_STYLE_WEIGHTS = {
    Style.STREAM: 6,
    Style.GENERATE: 4,
    Style.WATCH: 4,
    Style.RECONNECT: 4,
    Style.REJOIN: 2,
    Style.CANCEL: 2,
    Style.LEAVE: 1,
}
_PRIORITY_WEIGHTS = {Priority.BATCH: 2, Priority.NORMAL: 5, Priority.HIGH: 2, Priority.URGENT: 1}


@dataclass(frozen=True, slots=True)
class ChaosJob:
    """One job. A client that disconnects or stops does so after `leaves_after_events` events, and stays away for
    `away_ms`; other styles take no notice of either.
    """

    index: int
    prompt: str
    options: RequestOptions
    style: Style
    leaves_after_events: int
    away_ms: int

    @property
    def wants_drafts(self) -> bool:
        """Everybody who reads events wants every denoising step."""
        return self.style is not Style.GENERATE


def draw_job(seed: int, index: int) -> ChaosJob:
    """Job `index` of the run with this seed."""
    rng = random.Random(f"easel chaos {seed} job {index}")
    share = rng.random()
    is_short = share < _SHORT_SHARE
    prompt = endless_prompt(rng) if share >= 1 - _ENDLESS_SHARE else promised_prompt(rng)
    options: RequestOptions = {
        "seed": rng.randrange(MAX_SEED),
        "priority": rng.choices(list(_PRIORITY_WEIGHTS), list(_PRIORITY_WEIGHTS.values()))[0],
        "tenant": f"tenant-{rng.randrange(3)}",
    }
    if not is_short:
        options["confidence_threshold"] = NEVER_SURE_NATS
        options["max_denoising_steps"] = rng.randint(12, 24)
        options["max_new_tokens"] = CANVAS_TOKENS * rng.randint(4, 16)
    return ChaosJob(
        index=index,
        prompt=prompt,
        options=options,
        style=rng.choices(list(_STYLE_WEIGHTS), list(_STYLE_WEIGHTS.values()))[0],
        leaves_after_events=rng.randint(1, 60),
        away_ms=rng.randint(10, 400),
    )
