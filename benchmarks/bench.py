"""All of this machine's figures in one run: `make bench`. The last line is one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict

from benchmarks.degree import measure_degree_ratio
from benchmarks.engine import measure_engine_ratios
from benchmarks.serving import measure_prefix_reuse, measure_serving_ratios
from benchmarks.stack import measure_stack


def main() -> None:
    """Print the engine's ratios over transformers and over itself, and what the stack adds to an engine."""
    print("the engine over transformers' generate, mixed tasks, one thread (about 2 minutes)", flush=True)
    figures = measure_engine_ratios()
    print(
        "the engine over transformers' generate under Poisson arrivals, 1, 8 and 32 in flight (about 1 minute)",
        flush=True,
    )
    figures |= measure_serving_ratios()
    print(
        "prefix reuse on over off, 400 tokens of prefix in common; tensor-parallel degrees (under 1 minute)", flush=True
    )
    figures |= measure_prefix_reuse() | measure_degree_ratio()
    print("the stack around an engine of 15 ms a step, 8 slots full (about 1 minute)", flush=True)
    figures |= asdict(measure_stack())
    for name, value in figures.items():
        print(f"  {name:<38} {value:8.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
