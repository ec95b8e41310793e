"""The arithmetic of capacity planning, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks import capacity

H100 = next(gpu for gpu in capacity.GPUS if gpu.name == "H100 SXM")


def test_one_canvas_is_bound_by_reading_the_weights() -> None:
    assert capacity.step_floor_ms(H100, 1, 1) == pytest.approx(52.0e9 / 3.35e12 * 1000)
    assert capacity.step_floor_ms(H100, 1, 4) == capacity.step_floor_ms(H100, 1, 1)


def test_eight_canvases_are_bound_by_compute() -> None:
    assert capacity.step_floor_ms(H100, 1, 8) == pytest.approx(8 * 2.53e12 / 989e12 * 1000)
    assert 4 < capacity.useful_slots(H100) < 8


def test_ranks_share_the_work() -> None:
    assert capacity.step_floor_ms(H100, 4, 8) == pytest.approx(capacity.step_floor_ms(H100, 1, 8) / 4)
    assert capacity.canvases_per_s(H100, 4, 8, 10) == pytest.approx(4 * capacity.canvases_per_s(H100, 1, 8, 10))


def test_replicas_are_counted_with_room_for_bursts() -> None:
    assert capacity.replicas_for(10, 10) == 2
    assert capacity.replicas_for(7, 10) == 1
    assert capacity.replicas_for(0, 10) == 1


def test_the_memory_beside_the_weights_holds_the_context() -> None:
    assert capacity.KV_BYTES_PER_TOKEN == 225_280
    assert capacity.kv_tokens(H100, 1) == int((72e9 - 52e9) / 225_280)
    small = capacity.Gpu("small", 1e12, 1e14, 40e9)
    assert capacity.kv_tokens(small, 1) == 0


def test_the_table_has_a_row_for_every_gpu_and_degree() -> None:
    lines = capacity.table([1, 4], 26.6, 10)
    assert sum(line.startswith("H100") for line in lines) == 2
    assert "15.5 / 2.42" in "\n".join(lines)
