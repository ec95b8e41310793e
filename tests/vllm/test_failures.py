"""vLLM's process dies, hangs, computes nonsense, or is not the vLLM that the plugin knows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import ConfigError, EngineError
from deployments.engine import vllm_core, vllm_entry
from deployments.engine.torch_tp.engine import load_engine as load_torch
from deployments.engine.vllm_engine import VllmEngine, load_engine
from tests.contract.engines import drive
from tests.oracle import copy_checkpoint, some_checkpoint
from tests.vllm.driving import run_all, tokens_of, varied_jobs

NOTICED_WITHIN_S = 20.0


def checkpoint() -> Path:
    path = some_checkpoint()
    assert path is not None
    return path


@pytest.fixture
def others() -> set[psutil.Process]:
    """Processes of engines that other tests share."""
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def engine(others: set[psutil.Process]) -> Iterator[VllmEngine]:
    engine = load_engine(checkpoint(), slots=2, enforce_eager=True, step_timeout_s=10.0)
    yield engine
    engine.close()
    engine.close()


def children(named: str, others: set[psutil.Process]) -> list[psutil.Process]:
    """vLLM's processes of this test, by the title that vLLM gives them."""
    return [p for p in psutil.Process().children(recursive=True) if p not in others and named in title_of(p)]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def wait_lost(engine: VllmEngine) -> str:
    end_s = time.monotonic() + NOTICED_WITHIN_S
    while time.monotonic() < end_s:
        reason = engine.lost()
        if reason is not None:
            return reason
        time.sleep(0.01)
    raise AssertionError("the loss is not noticed")


def test_a_killed_engine_process_is_noticed_and_its_jobs_go_on_elsewhere(
    engine: VllmEngine, others: set[psutil.Process]
) -> None:
    jobs = varied_jobs(engine.card, 2)
    elsewhere = load_torch(checkpoint(), slots=2, device="cpu")
    expected = tokens_of(run_all(elsewhere, jobs)[1])
    for job in jobs:
        engine.start(job)
    drive(engine, steps=2)
    assert engine.lost() is None
    (core,), workers = children("EngineCore", others), children("VLLM::Worker", others)
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="vllm"):
        drive(engine)
    assert "vllm" in wait_lost(engine)
    # A replica stops its jobs and closes, whatever its engine is.
    engine.stop(jobs[0].job_id)
    # Nothing is left behind that holds memory.
    _, alive = psutil.wait_procs(workers, timeout=NOTICED_WITHIN_S)
    assert not alive
    assert tokens_of(run_all(elsewhere, jobs)[1]) == expected


def test_an_idle_engine_whose_process_dies_is_lost(engine: VllmEngine, others: set[psutil.Process]) -> None:
    (core,) = children("EngineCore", others)
    os.kill(core.pid, signal.SIGKILL)
    assert "vllm" in wait_lost(engine)


def test_a_forward_that_hangs_ends_the_wait(engine: VllmEngine, others: set[psutil.Process]) -> None:
    engine.start(varied_jobs(engine.card, 1)[0])
    (worker,) = children("VLLM::Worker", others)
    worker.suspend()
    try:
        with pytest.raises(EngineError, match="within 10 s"):
            drive(engine)
    finally:
        worker.resume()


def test_scores_that_are_no_numbers_are_a_failure(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy_checkpoint(checkpoint(), tmp_path / "broken")
    weights: dict[str, Any] = load_file(path / "model.safetensors")
    weights["model.decoder.norm.weight"].fill_(float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    engine = load_engine(path, slots=1, enforce_eager=True)
    try:
        engine.start(varied_jobs(engine.card, 1)[0])
        with pytest.raises(EngineError, match="no numbers"):
            drive(engine)
    finally:
        engine.close()


def test_another_vllm_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_entry, "VLLM_VERSION", "0.31.4")
    with pytest.raises(EngineError, match=r"needs vllm 0\.31\.4, this is 0\.32\.0"):
        load_engine(checkpoint(), slots=1)


def test_settings_that_cannot_be_are_refused_before_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_core.VllmCore, "_meet", None)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 64; 4 slots of 32 tokens need at least 128"):
        load_engine(checkpoint(), slots=4, batch_tokens=64)
    with pytest.raises(ConfigError, match=r"denoiser\.device is 'cuda', but this vllm runs on 'cpu'"):
        load_engine(checkpoint(), slots=4, device="cuda")
    with pytest.raises(ConfigError, match="max_context_tokens is 9999"):
        load_engine(checkpoint(), slots=4, max_context_tokens=9999)
    with pytest.raises(ConfigError, match="tensor-parallel degree is 3"):
        load_engine(checkpoint(), slots=4, tp=3)
