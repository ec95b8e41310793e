"""Throughput and latency over concurrency, as PNGs for docs/performance.md: `make plots`.

Each point is the round of median throughput of benchmarks.serving at that concurrency: Poisson arrivals, the engine
and transformers on the same jobs, one thread. The last line is one JSON object with the numbers that were drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.serving import JOBS, Bench, Point, Served, one_thread

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "img"
OURS, THEIRS = "#0b6e99", "#b3541e"
Curve = tuple[str, str, str, Callable[[Point], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(JOBS), choices=list(JOBS))
    arguments = parser.parse_args()
    with one_thread():
        bench = Bench()
        points = [bench.point(size) for size in arguments.concurrency]
    for path in draw(points, arguments.folder):
        print(path)
    print(json.dumps([numbers_of(point) for point in points]))


def typical(rounds: Sequence[Served]) -> Served:
    """The round of median throughput."""
    return sorted(rounds, key=lambda served: served.tokens_per_s)[len(rounds) // 2]


def numbers_of(point: Point) -> dict[str, float]:
    """What is drawn of one point."""
    sides = {"engine": typical(point.ours), "transformers": typical(point.theirs)}
    numbers: dict[str, float] = {"concurrency": point.concurrency}
    for name, served in sides.items():
        numbers[f"{name}_tokens_per_s"] = round(served.tokens_per_s, 1)
        numbers |= {f"{name}_p{part}_ms": round(served.latency_ms(part / 100), 1) for part in (50, 95)}
    return numbers


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes throughput.png and latency.png into `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    throughput: list[Curve] = [
        ("Easel", OURS, "-", lambda point: typical(point.ours).tokens_per_s),
        ("transformers generate", THEIRS, "-", lambda point: typical(point.theirs).tokens_per_s),
    ]
    latency: list[Curve] = [
        *_latency_curves("Easel", OURS, lambda point: typical(point.ours)),
        *_latency_curves("transformers generate", THEIRS, lambda point: typical(point.theirs)),
    ]
    return [
        _figure(points, throughput, "tokens per second", folder / "throughput.png"),
        _figure(points, latency, "arrival to whole answer, ms", folder / "latency.png"),
    ]


def _latency_curves(name: str, colour: str, side: Callable[[Point], Served]) -> list[Curve]:
    return [
        (f"{name}, median", colour, "-", lambda point: side(point).latency_ms(0.5)),
        (f"{name}, 95 of 100", colour, ":", lambda point: side(point).latency_ms(0.95)),
    ]


def _figure(points: Sequence[Point], curves: Sequence[Curve], unit: str, path: Path) -> Path:
    # Without pyplot there is no state of the process, and no window system is asked for.
    from matplotlib.figure import Figure  # noqa: PLC0415 - dev only

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    sizes = [point.concurrency for point in points]
    for label, colour, line, value in curves:
        axes.plot(sizes, [value(point) for point in points], color=colour, linestyle=line, marker="o", label=label)
    axes.set_xscale("log", base=2)
    values = [value(point) for *_, value in curves for point in points]
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("jobs in flight at most, Poisson arrivals")
    axes.set_ylabel(unit)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(frameon=False)
    # No date and no version inside: the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()
