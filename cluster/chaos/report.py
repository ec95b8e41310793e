"""What came out of a chaos run: a table for people, and one JSON object for programs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.chaos.recovery import Kill, Recovery, percentile
from cluster.chaos.schedule import KillKind
from cluster.chaos.settling import Leak
from cluster.chaos.transcript import Transcript
from cluster.chaos.verdict import Ending, Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run found. `left_over` counts processes that outlived the stopped cluster."""

    seed: int
    transcripts: Sequence[Transcript]
    endings: Sequence[Ending]
    verdicts: Sequence[Verdict]
    kills: Sequence[Kill]
    skipped: Mapping[KillKind, int]
    recoveries: Sequence[Recovery]
    leak: Leak
    seconds: float
    calm_seconds: float
    left_over: int = 0

    @property
    def leaked(self) -> int:
        """Slots, and processes of the running and of the stopped cluster."""
        return self.leak.slots + self.leak.processes + self.left_over

    @property
    def passed(self) -> bool:
        """True when nothing was lost, duplicated, different or leaked."""
        figures = self.figures()
        return not any(figures[name] for name in ("lost", "duplicated", "different", "leaked"))

    def figures(self) -> dict[str, Any]:
        """The last line of the output; times in ms are null where nothing was measured."""
        times_ms = [recovery.ms for recovery in self.recoveries]
        clean_ms = [recovery.ms for recovery in self.recoveries if recovery.is_clean]
        by_kind = Counter(kill.kind for kill in self.kills)
        return {
            "jobs": len(self.transcripts),
            "seed": self.seed,
            "kills": {kind.value: by_kind[kind] for kind in KillKind},
            "lost": sum(bool(verdict.lost) for verdict in self.verdicts),
            "duplicated": sum(len(verdict.duplicated) for verdict in self.verdicts),
            "different": sum(bool(verdict.different) for verdict in self.verdicts),
            "leaked": self.leaked,
            "cancelled": sum(ending.state == "cancelled" for ending in self.endings),
            "attempts": sum(ending.attempts for ending in self.endings),
            "preemptions": sum(ending.preemptions for ending in self.endings),
            "redone_steps": sum(transcript.redone_steps for transcript in self.transcripts),
            "broken_calls": sum(len(transcript.broken_calls) for transcript in self.transcripts),
            "streams_hit": len(times_ms),
            "streams_hit_clean": len(clean_ms),
            **_times("kill_to_step", times_ms),
            **_times("kill_to_step_clean", clean_ms),
            "seconds": round(self.seconds, 1),
            "undisturbed_seconds": round(self.calm_seconds, 1),
        }

    def problems(self) -> list[str]:
        """Everything that is wrong, a line each, with the job's id where it is a job's."""
        lines = [line for verdict in self.verdicts for line in verdict.lines()]
        named = (
            (self.leak.slots, "slots are taken, or jobs queued, although every job has ended"),
            (self.leak.processes, "replica or router processes are too many"),
            (self.leak.missing, "replicas or routers did not come back"),
            (self.left_over, "processes outlived the stopped cluster"),
        )
        return lines + [f"{count} {what}" for count, what in named if count]

    def broken_calls(self) -> list[str]:
        """Errors that ended a call although its job went on: EaselClient is meant to hide them."""
        return [f"{notes.job_id}: broken call: {said}" for notes in self.transcripts for said in notes.broken_calls]

    def table(self) -> Table:
        """The figures, named for people."""
        figures = self.figures()
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for name, value in figures.items():
            if isinstance(value, dict):
                for kind, count in value.items():
                    table.add_row(f"kills: {kind}", _with_skipped(count, self.skipped.get(KillKind(kind), 0)))
            else:
                table.add_row(name.replace("_", " "), "-" if value is None else str(value))
        return table


def _times(name: str, values_ms: Sequence[float]) -> dict[str, float | None]:
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    found = {f"{name}_{word}_ms": percentile(values_ms, share) for word, share in shares}
    return {key: None if value is None else round(value, 1) for key, value in found.items()}


def _with_skipped(count: int, skipped: int) -> str:
    return f"{count} ({skipped} skipped)" if skipped else str(count)
