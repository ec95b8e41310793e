"""Is the answer of the disturbed run that of the undisturbed one, and did its readers get it once? Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.chaos.transcript import Heard, Transcript

_ENDED_WELL = "succeeded"
_STOPPED = "cancelled"


@dataclass(frozen=True, slots=True)
class Ending:
    """A job as the cluster keeps it after the run. `notes` say why it failed: its error and its history."""

    state: str
    token_ids: tuple[int, ...] = ()
    attempts: int = 0
    preemptions: int = 0
    notes: tuple[str, ...] = ()


MISSING = Ending("missing")


@dataclass(slots=True)
class Verdict:
    """What is wrong with one job, a line each; all empty when nothing is."""

    job_id: str
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Everything, with the job's id."""
        named = (("lost", self.lost), ("duplicated", self.duplicated), ("different", self.different))
        return [f"{self.job_id}: {name}: {line}" for name, lines in named for line in lines]


def judge(calm: Transcript, storm: Transcript, ending: Ending) -> Verdict:
    """Compare what the readers of a disturbed job got, and what the cluster keeps, with the undisturbed run."""
    verdict = Verdict(storm.job_id)
    verdict.lost += _lost(storm, ending)
    verdict.duplicated += storm.faults
    verdict.different += _different(calm, storm, ending)
    return verdict


def _lost(storm: Transcript, ending: Ending) -> list[str]:
    if ending.state == _STOPPED and storm.asked_to_stop:
        return []
    if ending.state != _ENDED_WELL:
        return [f"it is {ending.state}", *ending.notes, *([storm.problem] if storm.problem else [])]
    if not storm.finished and not storm.asked_to_stop:
        return [f"it succeeded, and its reader did not get the end: {storm.problem or 'the stream just stopped'}"]
    return []


def _different(calm: Transcript, storm: Transcript, ending: Ending) -> list[str]:
    wanted = {canvas.index: canvas for canvas in calm.canvases}
    found = [line for heard in storm.canvases for line in _canvas_differs(heard, wanted.get(heard.index))]
    missing = sorted(wanted.keys() - {heard.index for heard in storm.canvases})
    if missing and storm.finished and storm.whole is None:
        found.append(f"canvases {missing} of the expected answer never came, and the stream ended well")
    prefixes = _prefixes(calm)
    if storm.whole is not None and storm.whole != prefixes[-1]:
        found.append(f"the whole answer has {len(storm.whole)} tokens that are not the {len(prefixes[-1])} expected")
    if ending.state == _ENDED_WELL and ending.token_ids != prefixes[-1]:
        found.append("the stored answer is not the expected one")
    if ending.state == _STOPPED and ending.token_ids not in prefixes:
        found.append("what is stored of it is no whole number of canvases of the expected answer")
    return found


def _canvas_differs(heard: Heard, wanted: Heard | None) -> list[str]:
    if wanted is None:
        return [f"canvas {heard.index} is beyond the end of the expected answer"]
    return [
        f"canvas {heard.index} differs in {name}: {got!r}, expected {expected!r}"
        for name, got, expected in (
            ("token_ids", heard.token_ids, wanted.token_ids),
            ("text", heard.text, wanted.text),
            ("denoising_steps", heard.denoising_steps, wanted.denoising_steps),
        )
        if got != expected
    ]


def _prefixes(calm: Transcript) -> list[tuple[int, ...]]:
    """The tokens of no canvas, of the first, of the first two and so on; the last is the whole answer."""
    prefixes: list[tuple[int, ...]] = [()]
    for canvas in calm.canvases:
        prefixes.append(prefixes[-1] + canvas.token_ids)
    return prefixes
