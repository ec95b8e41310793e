"""The vllm engine without vLLM: its connection to the plugin, and what it makes of what comes over it.

`make test-vllm` runs the whole on a real vLLM. Here a worker of the test's own speaks over the real connection.
"""

from __future__ import annotations

import math
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.checkpoint import read_checkpoint
from cluster.config import parse_settings
from cluster.errors import ConfigError, EngineError
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.link import accept_follower
from deployments.engine.vllm_core import VllmSettings
from deployments.engine.vllm_engine import VllmEngine
from deployments.engine.vllm_entry import VLLM_VERSION, check_plugin, check_version
from deployments.engine.vllm_wire import (
    Address,
    Canvas,
    EngineEnd,
    Go,
    Ready,
    Saved,
    Snapshot,
    StepEvent,
    Stop,
    WorkerEnd,
)
from deployments.placement import placement_options
from tests.oracle import encode

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "tiny"
BOUND_S = 10.0


class Ends:
    """Both ends of one connection; `exits` are the codes with which the worker's process would have ended."""

    def __init__(self) -> None:
        key, self.exits, gone = secrets.token_bytes(32), list[int](), threading.Event()
        self.gone = gone

        def leave(code: int) -> None:
            self.exits.append(code)
            gone.set()

        found: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            door = threading.Thread(target=lambda: found.append(_accepted(listener, key)))
            door.start()
            address = Address("127.0.0.1", listener.getsockname()[1], key, BOUND_S)
            self.worker = WorkerEnd(address, "cpu", 2, leave)
            door.join(BOUND_S)
        self.peer = found[0]
        self.engine = EngineEnd(self.peer, BOUND_S)
        assert self.engine.next(BOUND_S) == Ready("cpu", 2)


def _accepted(listener: socket.socket, key: bytes) -> socket.socket:
    follower = accept_follower(listener, key, BOUND_S)
    assert follower is not None
    return follower[1]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.engine.close()


class Forward(threading.Thread):
    """A forward over the requests `keys`; `wanted` is None while it waits."""

    def __init__(self, ends: Ends, keys: set[str]) -> None:
        super().__init__(daemon=True)
        self._ends, self._keys = ends, keys
        self.wanted: bool | None = None
        self.start()

    def run(self) -> None:
        self.wanted = self._ends.worker.wait(self._keys, lambda key: None)

    def result(self) -> bool | None:
        self.join(BOUND_S)
        return self.wanted


def test_a_forward_waits_until_it_is_asked_for(ends: Ends) -> None:
    forward = Forward(ends, {"a"})
    ends.engine.send(Snapshot("a"))
    # The answer shows that it waits: snapshots are taken between forwards.
    assert ends.engine.next(BOUND_S) == Saved("a", None)
    assert forward.is_alive()
    ends.engine.send(Go())
    assert forward.result() is True


def test_a_forward_for_stopped_requests_alone_waits_for_nobody_and_takes_no_turn(ends: Ends) -> None:
    both, alone = Forward(ends, {"a", "b"}), Forward(ends, {"a"})
    ends.engine.send(Stop("a"))
    assert alone.result() is False
    ends.engine.send(Go())
    assert both.result() is True
    ends.worker.forget("a")
    again = Forward(ends, {"a"})
    ends.engine.send(Go())
    assert again.result() is True


def test_nothing_waits_once_the_engine_closes(ends: Ends) -> None:
    forward = Forward(ends, {"a"})
    ends.engine.close()
    assert forward.result() is False
    assert not ends.exits


def test_the_worker_ends_with_the_replica(ends: Ends) -> None:
    ends.peer.shutdown(socket.SHUT_RDWR)
    assert ends.gone.wait(BOUND_S)
    assert ends.exits == [1]


def test_the_end_of_the_worker_is_a_loss(ends: Ends) -> None:
    ends.worker._peer.shutdown(socket.SHUT_RDWR)
    assert ends.engine.next(BOUND_S) is None
    assert ends.engine.lost == "vllm's worker has ended"


class Core:
    """What the engine uses of VllmCore, with the test in place of vLLM."""

    def __init__(self, ends: Ends, settings: VllmSettings) -> None:
        self.checkpoint, self.settings = read_checkpoint(CHECKPOINT), settings
        self.words, self.ready = ends.engine, Ready("cpu", 1)
        self.blocks, self.block_tokens = 64, 16
        self.keys: list[str] = []
        self.ended = False

    def add(
        self, key: str, tokens: list[int], plan: dict[str, Any], max_tokens: int, images: Sequence[object] = ()
    ) -> None:
        self.keys.append(key)

    def abort(self, key: str) -> None: ...

    def has_ended(self, key: str) -> bool:
        return self.ended

    def lost(self) -> str | None:
        return self.words.lost

    def close(self) -> None: ...


@pytest.fixture
def core(ends: Ends) -> Core:
    return Core(ends, VllmSettings(slots=2, step_timeout_s=3.0))


@pytest.fixture
def engine(core: Core) -> VllmEngine:
    return VllmEngine(core)  # type: ignore[arg-type]


def begin(engine: VllmEngine) -> None:
    engine.start(EngineJob("a", encode("sort 3 1"), replace(engine.card.defaults, max_new_tokens=64)))


def canvas(core: Core, token: int, entropy: float, *, index: int = 0) -> StepEvent:
    tokens = np.full(core.checkpoint.card.canvas_tokens, token, dtype=np.int64)
    return StepEvent((Canvas(core.keys[0], index, 3, entropy, 5, tokens, converged=True, last=False),))


def test_scores_that_are_no_numbers_break_the_engine(engine: VllmEngine, core: Core, ends: Ends) -> None:
    begin(engine)
    ends.worker.report(canvas(core, 7, math.nan))
    with pytest.raises(EngineError, match=r"no numbers \(canvas 0, step 3\)"):
        engine.step()


def test_a_canvas_of_padding_from_scores_that_are_all_the_same_breaks_the_engine(
    engine: VllmEngine, core: Core, ends: Ends
) -> None:
    begin(engine)
    ends.worker.report(canvas(core, engine.card.pad_token_id, math.log(engine.card.vocab_size)))
    with pytest.raises(EngineError, match="a canvas of padding alone"):
        engine.step()


def test_a_canvas_of_padding_that_the_model_is_sure_of_is_an_answer(engine: VllmEngine, core: Core, ends: Ends) -> None:
    begin(engine)
    ends.worker.report(canvas(core, engine.card.pad_token_id, 1e-6, index=1))
    (commit,) = engine.step().commits
    assert set(commit.tokens) == {engine.card.pad_token_id}


def test_a_request_that_vllm_ends_early_breaks_the_engine(engine: VllmEngine, core: Core) -> None:
    begin(engine)
    core.ended = True
    with pytest.raises(EngineError, match="ended job a before its last canvas"):
        engine.step()


def test_a_silent_worker_breaks_the_engine(engine: VllmEngine) -> None:
    begin(engine)
    with pytest.raises(EngineError, match="did not run a step within 3 s"):
        engine.step()


def test_a_lost_worker_breaks_the_step_that_waits(engine: VllmEngine, ends: Ends) -> None:
    begin(engine)
    ends.worker._peer.shutdown(socket.SHUT_RDWR)
    with pytest.raises(EngineError, match="vllm"):
        engine.step()
    assert engine.lost() == "vllm's worker has ended"
    engine.stop("a")
    assert engine.stats().active_jobs == 0


def test_another_version_and_a_missing_plugin_are_named() -> None:
    check_version(VLLM_VERSION)
    check_version(f"{VLLM_VERSION}+cpu")
    with pytest.raises(EngineError, match=rf"needs vllm {VLLM_VERSION}, this is 0\.33\.1: pip install easel\[vllm\]"):
        check_version("0.33.1")
    with pytest.raises(EngineError, match=r"VLLM_PLUGINS is 'other'|is not registered"):
        check_plugin(["other"])


def test_settings_of_vllm_are_refused_with_another_engine() -> None:
    def parse(**denoiser: Any) -> SimpleNamespace:  # noqa: ANN401
        return SimpleNamespace(denoiser=parse_settings({"checkpoint": "x", "denoiser": denoiser}).denoiser)

    assert parse(engine="vllm", vllm={"enforce_eager": True}).denoiser.vllm.enforce_eager
    assert parse(vllm={"enforce_eager": False}).denoiser.engine == "torch"
    with pytest.raises(ConfigError, match=r"denoiser\.vllm: .* the torch engine takes none of it, and enforce_eager"):
        parse(vllm={"enforce_eager": True})
    with pytest.raises(ConfigError, match=r"denoiser\.vllm\.speculative: unknown setting"):
        parse(engine="vllm", vllm={"speculative": 1})
    with pytest.raises(ConfigError, match="the vllm engine chooses its own threads"):
        parse(engine="vllm", threads=4)


def test_a_replica_of_several_ranks_leaves_the_gpus_to_vllms_workers() -> None:
    chosen = {"checkpoint": "x", "denoiser": {"engine": "vllm", "tp": 2, "num_gpus": 1, "num_cpus": 2}}
    options = placement_options(parse_settings(chosen).denoiser)
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 1}] * 2
    alone = parse_settings({"checkpoint": "x", "denoiser": chosen["denoiser"] | {"tp": 1}})  # type: ignore[operator]
    assert placement_options(alone.denoiser)["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
