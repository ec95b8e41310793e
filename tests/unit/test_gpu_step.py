"""The GPU measurement runs here, small and on the CPU; its shapes and its roofline are the published ones."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.gpu_step import main, measure, report
from benchmarks.shapes import SHAPE_26B, Roofline, random_checkpoint, step_flop, step_weight_bytes


def test_a_step_of_the_26b_shape_reads_and_computes_what_is_published() -> None:
    assert round(step_weight_bytes(SHAPE_26B) / 1e9, 1) == 52.0
    assert round(step_flop(SHAPE_26B, 1024) / 1e12, 2) == 2.53


def test_the_floor_is_reading_for_few_canvases_and_computing_for_many() -> None:
    h100 = Roofline(bytes_per_s=3e12, flop_per_s=700e12)
    assert h100.floor_ms(SHAPE_26B, 1, 1024) == pytest.approx(17.3, abs=0.1)
    assert h100.floor_ms(SHAPE_26B, 8, 1024) == pytest.approx(28.9, abs=0.1)


def test_a_drawn_checkpoint_names_every_tensor_of_its_shape() -> None:
    elements = sum(torch.Size(entry.shape).numel() for entry in random_checkpoint(SHAPE_26B).tensors.values())
    assert round(elements / 1e9, 2) == 25.25


def test_the_same_code_runs_small_on_the_cpu() -> None:
    torch.set_num_threads(1)
    measured = measure("tiny", torch.device("cpu"), (1, 2), steps=1)
    lines = report("tiny", measured).splitlines()
    numbers = json.loads(lines[-1])
    assert list(numbers) == ["1", "2"]
    assert all(value > 0 for row in numbers.values() for value in row.values())
    assert "over floor" in lines[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_in_one_line_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_step"])
    with pytest.raises(SystemExit, match=r"^gpu_step needs one CUDA GPU of 80 GB [^\n]*$"):
        main()
