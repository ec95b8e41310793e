"""What keeps a wish for fewer from being followed too soon: the highest wish of the last while."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Held:
    """The wishes of the last while that are still the highest since they were made, as (second, wish).

    Invariant: seconds rise and wishes fall, so it holds at most as many pairs as there are different wishes.
    """

    since_s: float | None = None
    peaks: tuple[tuple[float, int], ...] = ()


def hold(held: Held, now_s: float, wish: int, keep_s: float) -> tuple[int | None, Held]:
    """Add a wish; returns the highest of the last `keep_s`, or None while less than that has been seen."""
    since_s = now_s if held.since_s is None else held.since_s
    higher = [(at_s, peak) for at_s, peak in held.peaks if peak > wish and at_s > now_s - keep_s]
    peaks = (*higher, (now_s, wish))
    stable = now_s - since_s >= keep_s
    return peaks[0][1] if stable else None, Held(since_s, peaks)
