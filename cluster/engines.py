"""What each engine can do. The routers and the settings refuse the rest by name; `python -m cluster.engines` prints it.

docs/engines.md holds the printed table. Every line is used by the code or held by the contract suite, which runs
against each engine: tests/unit/test_engines.py says which test holds which line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """One engine: `purpose` in a few words, and what it supports, in the terms of TITLES.

    `dtypes`, `devices` and `quantizations` are values of the settings of these names. An engine that has no model has
    none of them, and None for `exact_beyond_window`.
    """

    name: str
    purpose: str
    images: bool
    drafts: bool
    seeds: bool
    canvas_checkpoints: bool
    ranks: bool
    prefix_reuse: bool
    exact_beyond_window: bool | None
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    quantizations: tuple[str, ...] = ()

    def refuses(self, setting: str, value: object) -> str | None:
        """Why `denoiser.<setting>` cannot be `value` with this engine; None when it can."""
        if setting == "tp" and value != 1 and not self.ranks:
            return f"the {self.name} engine runs one rank; only tp 1 is allowed with it"
        if setting == "checkpoint_every_steps" and value and not self.canvas_checkpoints:
            return f"the {self.name} engine saves no canvas in progress; only 0 is allowed with it"
        choices = {"dtype": self.dtypes, "device": (*self.devices, "auto") if self.devices else ()}.get(setting, ())
        if choices and value not in choices:
            return f"the {self.name} engine runs with {', '.join(choices)}"
        return None


FAKE = EngineTraits(
    name="fake",
    purpose="tests and load tests of what stands around an engine; its answers can be worked out by hand",
    images=False,
    drafts=True,
    seeds=True,
    canvas_checkpoints=True,
    ranks=False,
    prefix_reuse=False,
    exact_beyond_window=None,
    dtypes=(),
    devices=(),
)
TORCH = EngineTraits(
    name="torch",
    purpose="the reference: CPU and any GPU, checked token by token against transformers",
    images=False,
    drafts=True,
    seeds=True,
    canvas_checkpoints=True,
    ranks=True,
    prefix_reuse=True,
    exact_beyond_window=True,
    dtypes=("float32", "bfloat16"),
    devices=("cpu", "cuda"),
)
VLLM = EngineTraits(
    name="vllm",
    purpose="the fast one on GPUs",
    images=True,
    drafts=True,
    seeds=True,
    canvas_checkpoints=True,
    ranks=True,
    prefix_reuse=True,
    exact_beyond_window=False,
    dtypes=("float32", "bfloat16"),
    devices=("cpu", "cuda"),
    quantizations=("fp8", "modelopt", "modelopt_fp4", "nvfp4_per_token", "compressed-tensors"),
)
ENGINES = MappingProxyType({traits.name: traits for traits in (FAKE, TORCH, VLLM)})

TITLES = MappingProxyType(
    {
        "images": "images in chat messages",
        "drafts": "drafts: the canvas in progress after every step",
        "seeds": "a seed per request; the same seed gives the same tokens, whatever shares the batch",
        "canvas_checkpoints": "checkpoints inside a canvas: preemption and drain cost at most a step",
        "ranks": "replicas of several tensor-parallel ranks",
        "prefix_reuse": "reuse of prefixes that were computed before",
        "exact_beyond_window": "as the reference beyond the sliding window",
        "dtypes": "`denoiser.dtype`",
        "devices": "`denoiser.device`",
        "quantizations": "quantised weights: `denoiser.vllm.quantization`",
    }
)


def with_trait(trait: str) -> str:
    """Which engines have it, for a message."""
    names = [name for name, traits in ENGINES.items() if getattr(traits, trait)]
    return f"these do: {', '.join(names)}" if names else "none of this version does"


def table() -> str:
    """The table of docs/engines.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield f"| | {' | '.join(f'`{name}`' for name in ENGINES)} |"
    yield f"|---|{'---|' * len(ENGINES)}"
    yield f"| for | {' | '.join(traits.purpose for traits in ENGINES.values())} |"
    for trait, title in TITLES.items():
        yield f"| {title} | {' | '.join(_cell(getattr(traits, trait)) for traits in ENGINES.values())} |"


def _cell(value: bool | tuple[str, ...] | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value or ()) or "-"


if __name__ == "__main__":
    print(table(), end="")
