"""The GPU benchmark against vLLM: all of it that needs neither a GPU nor vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_vllm, vllm_parts
from benchmarks.dummy_checkpoint import write_dummy_checkpoint
from benchmarks.offered import Recorded, Run, load, random_prompts
from benchmarks.shapes import SHAPE_26B, SHAPE_TINY
from cluster.checkpoint import read_checkpoint
from cluster.config import parse_settings
from deployments.tokenizer import Tokenizer

SMALL = ("--engine", "fake", "--shape", "tiny", "--steps", "3", "--prompt-tokens", "40", "--new-tokens", "64")


def small(*more: str) -> Run:
    return gpu_vllm.run_of(gpu_vllm.parse_arguments([*SMALL, *more]))


def test_by_default_it_asks_what_is_published() -> None:
    run = gpu_vllm.run_of(gpu_vllm.parse_arguments([]))
    assert (run.concurrent, run.prompt_tokens, run.new_tokens, run.steps) == ((1, 4, 8), 1024, 1024, 16)
    assert (run.vocab_size, run.canvas_tokens, run.canvases) == (262_144, 256, 4)


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--concurrent", "4", "1"], ["--concurrent", "1", "1"]])
def test_numbers_that_make_no_sense_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_vllm.parse_arguments(wrong)
    assert "must be at least 1, and those of --concurrent must rise" in capsys.readouterr().err


def test_prompts_are_the_same_in_every_process_and_no_two_alike() -> None:
    run = Run.from_json(json.loads(json.dumps(small().as_json())))
    prompts = random_prompts(run)
    assert prompts == random_prompts(small())
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 1 + 3 * 13
    assert all(len(prompt) == 40 and max(prompt) < run.vocab_size for prompt in prompts)
    shares = [run.share(prompts, concurrent) for concurrent in run.concurrent]
    assert [prompt for share in shares for prompt in share] == prompts[1:]


def test_the_checkpoint_has_the_true_shape_and_takes_no_disk(tmp_path: Path) -> None:
    write_dummy_checkpoint(tmp_path, SHAPE_26B, 16)
    read = read_checkpoint(tmp_path)
    assert read.config == SHAPE_26B
    assert (read.card.defaults.max_denoising_steps, read.card.defaults.confidence_threshold) == (16, 1e-9)
    file = (tmp_path / "model.safetensors").stat()
    assert file.st_size > 50e9
    assert file.st_blocks * 512 < 1e6
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "gemma4_vision"
    Tokenizer(tmp_path)


async def test_every_caller_asks_again_as_soon_as_it_is_answered() -> None:
    asked: list[int] = []
    most = 0

    async def ask(number: int, prompt: list[int]) -> Recorded:
        nonlocal most
        asked.append(number)
        most = max(most, len(asked) - len(done))
        await asyncio.sleep(0)
        done.append(number)
        return Recorded(1, len(prompt), 2, 0.0)

    done: list[int] = []
    recorded = await load(ask, [[1, 2]] * 7, 3)
    assert (asked, most) == (list(range(7)), 3)
    assert (recorded.concurrent, recorded.tokens, recorded.denoising_steps) == (3, 14, 14)
    assert recorded.wall_s > 0


def test_figures_are_ratios_of_tokens_a_second() -> None:
    run = small("--concurrent", "1", "4", "--rounds", "2")
    alone = [Recorded(1, 128, None, 1.0), Recorded(4, 512, None, 2.0)]
    easel = [Recorded(1, 128, 12, 1.0), Recorded(4, 512, 48, 2.5)]
    assert gpu_vllm.figures(alone, easel) == {"easel_over_vllm_1": 1.0, "easel_over_vllm_4": 0.8}
    *table, said, numbers = gpu_vllm.report(run, alone, easel).splitlines()
    assert table[2].split() == ["4", "256.0", "204.8", "0.800"]
    assert said == "the aim is 0.97: not met"
    assert json.loads(numbers)["easel_over_vllm_4"] == 0.8


def test_answers_that_ended_early_are_told() -> None:
    run = small("--concurrent", "1", "--rounds", "2")
    assert gpu_vllm.odd_answers(run, [Recorded(1, 128, 12, 1.0)]) == []
    assert gpu_vllm.odd_answers(run, [Recorded(1, 128, None, 1.0)]) == []
    (line,) = gpu_vllm.odd_answers(run, [Recorded(1, 100, 12, 1.0)])
    assert line == "1 callers: 100 tokens in 12 steps, not 128 in 12: an answer ended early"


def test_the_settings_of_the_replica_are_valid_and_give_vllm_the_same_room(tmp_path: Path) -> None:
    run = small()
    settings = parse_settings(gpu_vllm.settings_for(tmp_path, run, "fake", 1))
    assert (settings.denoiser.slots, settings.denoiser.max_context_tokens) == (8, 40 + 64)
    arguments = vllm_parts.vllm_arguments(settings, run)
    assert (arguments["max_num_seqs"], arguments["max_model_len"], arguments["load_format"]) == (8, 104, "dummy")
    quantised = gpu_vllm.settings_for(tmp_path, small("--quantization", "fp8", "--eager"), "vllm", 2)["denoiser"]
    assert (quantised["vllm"], quantised["tp"], quantised["dtype"]) == (
        {"quantization": "fp8", "enforce_eager": True},
        2,
        "bfloat16",
    )


def test_weights_are_made_up_for_whoever_starts_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    names = types.ModuleType("vllm.engine.arg_utils")
    names.AsyncEngineArgs = dict  # type: ignore[attr-defined]  # stands in for vLLM's class
    for name, module in (("vllm", types.ModuleType("vllm")), ("vllm.engine", types.ModuleType("vllm.engine"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", names)
    with vllm_parts.made_up_weights():
        assert names.AsyncEngineArgs(model="m") == {"model": "m", "load_format": "dummy"}
    assert names.AsyncEngineArgs is dict


def test_the_half_through_easel_runs_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_vllm", *SMALL, "--concurrent", "1", "2", "--rounds", "2"])
    gpu_vllm.main()
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["1", "2"]
    assert len(table) == 4, "no answer ended early"
    assert json.loads(table[-1])["easel_tokens_per_s_2"] > 0


async def test_a_part_that_ends_is_told_with_its_name(tmp_path: Path) -> None:
    values = gpu_vllm.settings_for(tmp_path / "nothing", small(), "fake", 1)
    async with gpu_vllm.started("replica", values, small()) as part:
        with pytest.raises(SystemExit, match="the replica ended with 1; its log is above"):
            await part.said(60.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_in_one_line_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_vllm"])
    with pytest.raises(SystemExit, match=r"^gpu_vllm needs one CUDA GPU of 80 GB [^\n]*$"):
        gpu_vllm.main()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_it_says_in_one_line_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_vllm"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"^gpu_vllm needs vllm: pip install 'easel\[vllm\]'; [^\n]*$"):
        gpu_vllm.main()


def test_the_shape_in_seconds_is_the_small_one() -> None:
    assert small().vocab_size == SHAPE_TINY.vocab_size
