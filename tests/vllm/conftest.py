"""Engines on a real vLLM, without a GPU. `make test-vllm` runs these in an environment that has vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.oracle import some_checkpoint

if TYPE_CHECKING:
    from deployments.engine.vllm_engine import VllmEngine

collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_*.py"]

# What the tests ask for at most at once. vLLM takes half a minute to start, so engines share what has started.
POOL_SLOTS = 8
LEFT_WITHIN_S = 10.0


class Lent:
    """A VllmCore that goes back to the pool when its engine is closed."""

    def __init__(self, core: Any, idle: list[Any]) -> None:  # noqa: ANN401
        self._core, self._idle = core, idle

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._core, name)

    def close(self) -> None:
        if self._core not in self._idle and self._core.lost() is None:
            self._idle.append(self._core)


class Pool:
    """Starts vLLM when nobody has left one, and ends all at the end."""

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint
        self._idle: list[Any] = []
        self._all: list[Any] = []

    def engine(self, slots: int) -> VllmEngine:
        from deployments.engine.vllm_engine import VllmEngine

        core = self._idle.pop() if self._idle else self._start()
        # What other tests computed must not count; their jobs leave vLLM a moment after they were stopped.
        end_s = time.monotonic() + LEFT_WITHIN_S
        while not core.forget_prefixes() and time.monotonic() < end_s:
            time.sleep(0.02)
        return VllmEngine(Lent(core, self._idle), slots=slots)  # type: ignore[arg-type]

    def close(self) -> None:
        for core in self._all:
            core.close()

    def _start(self) -> Any:  # noqa: ANN401
        from cluster.checkpoint import read_checkpoint
        from deployments.engine.vllm_core import VllmCore, VllmSettings

        self._all.append(VllmCore(read_checkpoint(self._path), VllmSettings(slots=POOL_SLOTS, enforce_eager=True)))
        return self._all[-1]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    pool = Pool(path)
    yield pool
    pool.close()


@pytest.fixture
def make(pool: Pool) -> Iterator[Callable[[int], VllmEngine]]:
    """Makes engines of so many slots; all are closed at the end of the test."""
    made: list[VllmEngine] = []

    def make(slots: int) -> VllmEngine:
        made.append(pool.engine(slots))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        engine.close()
