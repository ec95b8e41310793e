"""What a rank reads and allocates when it loads its shard: its part of every matrix, once, and never a whole one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.loading import Loaded, load_shard, report, shard_elements, write_checkpoint
from benchmarks.shapes import SHAPE_TINY
from cluster.checkpoint import Checkpoint, ModelConfig
from cluster.weight_files import TensorEntry
from deployments.engine.torch_tp import weights
from deployments.engine.torch_tp.shard import Shard

# As many kv heads as the highest degree here, and sizes that it divides: every part is the same share.
SHAPE = replace(
    SHAPE_TINY, attention_heads=4, layers=tuple(replace(layer, kv_heads=4) for layer in SHAPE_TINY.layers[:2])
)
WHOLE_ON_EVERY_RANK = ("norm", "router", "layer_scalar")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("loading"), SHAPE)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Elements that were taken out of the files, by tensor."""
    counted: Counter[str] = Counter()
    monkeypatch.setattr(weights, "safe_open", lambda *names, **options: CountingFile(counted, *names, **options))
    return counted


class CountingFile:
    """A safetensors file that counts what is taken out of it."""

    original = staticmethod(safe_open)

    def __init__(self, counted: Counter[str], *names: Any, **options: Any) -> None:  # noqa: ANN401 - as it is called
        self._counted = counted
        self._file = self.original(*names, **options)

    def __enter__(self) -> CountingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def get_tensor(self, name: str) -> Tensor:
        return self._count(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self, name, self._file.get_slice(name))

    def _count(self, name: str, tensor: Tensor) -> Tensor:
        self._counted[name] += tensor.numel()
        return tensor


class CountingSlice:
    """What a file gives for a part of a tensor."""

    def __init__(self, file: CountingFile, name: str, opened: Any) -> None:  # noqa: ANN401 - has no type
        self._file, self._name, self._opened = file, name, opened

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        return self._file._count(self._name, self._opened[part])


class Largest(TorchDispatchMode):
    """The most bytes that any tensor has which was allocated under it: a view has its memory from an argument."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.allocated_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - any operation of torch
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and _memory(leaf) not in given]
        # `set_` puts a tensor onto the mapped file.
        if func.overloadpacket.__name__ != "set_":
            self.allocated_bytes = max(self.allocated_bytes, *(leaf.nbytes for leaf in made), 0)
        return out


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def read_tensors(checkpoint: Checkpoint) -> list[tuple[str, TensorEntry]]:
    """Those that the model needs: encoder and decoder are one, and the encoder has scalars of its own."""
    return [(name, entry) for name, entry in checkpoint.tensors.items() if name.startswith("model.decoder.")]


def is_whole(name: str) -> bool:
    return any(word in name for word in WHOLE_ON_EVERY_RANK)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_reads_its_share_of_every_matrix_once(checkpoint: Checkpoint, read: Counter[str], world: int) -> None:
    for rank in range(world):
        read.clear()
        weights.load_weights(checkpoint, torch.bfloat16, CPU, Shard(rank, world))
        for name, entry in read_tensors(checkpoint):
            whole = torch.Size(entry.shape).numel()
            assert read[name] == (whole if is_whole(name) else whole // world), name


@pytest.mark.parametrize("world", [2, 4])
def test_the_largest_tensor_that_a_rank_ever_makes_is_its_share_of_the_largest_of_one_rank(
    checkpoint: Checkpoint, world: int
) -> None:
    whole = max(torch.Size(entry.shape).numel() for name, entry in checkpoint.tensors.items() if is_whole(name))
    alone, shared = Largest(), Largest()
    with alone:
        weights.load_weights(checkpoint, torch.bfloat16, CPU, Shard())
    with shared:
        weights.load_weights(checkpoint, torch.bfloat16, CPU, Shard(1, world))
    assert 4 * whole < alone.allocated_bytes // world
    assert shared.allocated_bytes == alone.allocated_bytes // world


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_benchmarks_shard_is_what_a_rank_reads(checkpoint: Checkpoint, read: Counter[str], world: int) -> None:
    weights.load_weights(checkpoint, torch.bfloat16, CPU, Shard(0, world))
    matrices = sum(read[name] for name, entry in checkpoint.tensors.items() if len(entry.shape) > 1)
    assert matrices == shard_elements(SHAPE, Shard(0, world))


def test_the_benchmark_counts_the_memory_of_a_shard(checkpoint: Checkpoint) -> None:
    loaded = load_shard(checkpoint, Shard(0, 2), torch.float32)
    assert loaded.shard == 4 * shard_elements(SHAPE, Shard(0, 2))
    assert loaded.peak >= 0
    lines = report({"2": [loaded, Loaded(100, 150, 120, 10)]}).splitlines()
    assert '"loading_peak_over_shard_2"' in lines[-1]


def test_a_shape_with_uneven_parts_is_read_whole_by_all_ranks_together(tmp_path: Path, read: Counter[str]) -> None:
    uneven: ModelConfig = replace(SHAPE, vocab_size=125, intermediate_size=88)
    checkpoint = write_checkpoint(tmp_path, uneven)
    for rank in range(4):
        weights.load_weights(checkpoint, torch.float32, CPU, Shard(rank, 4))
    for name, entry in read_tensors(checkpoint):
        assert read[name] == torch.Size(entry.shape).numel() * (4 if is_whole(name) else 1), name
