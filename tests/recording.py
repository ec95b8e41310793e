"""A stand-in for CUDA graphs on the CPU: it keeps the operations of a step and repeats them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from deployments.engine.torch_tp.step_graph import Outputs, Replay

# On CUDA these wait for the device, or copy from the host's memory: neither can be in a graph.
FORBIDDEN = frozenset(
    (
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "lift_fresh",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
)
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


class Waits(RuntimeError):
    """An operation that a graph could not hold."""


class Tape(TorchDispatchMode):
    """Executes what runs under it, and keeps it. `again` repeats it: tensors that were there before are used where they
    lie, those that were made under it are made anew. Nothing that the host decided is decided again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - any operation of torch
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        check_recordable(func, args)
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def again(self, outputs: Outputs) -> Outputs:
        made: dict[int, Tensor] = {}

        def now(value: object) -> Any:  # noqa: ANN401 - as it comes
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, before in self._calls:
            out = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(out), strict=True):
                made[id(old)] = new
        return now(outputs[0]), now(outputs[1])


def check_recordable(func: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401
    """Raises Waits for what CUDA could not record."""
    name = func.overloadpacket.__name__
    if name in FORBIDDEN:
        raise Waits(f"{func} waits for the device")
    if name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
        raise Waits(f"{func} with a mask waits for the device")


class CpuRecorder:
    """Implements Recorder. As with a CUDA graph, recording executes nothing: the tape is made by the first replay."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.released = 0
        self.fails: Exception | None = None

    def warm_up(self, run: Replay) -> Outputs:
        return run()

    def record(self, run: Replay) -> Replay:
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        return self._counted(_taped(run))

    def release(self) -> None:
        self.released += 1

    def _counted(self, replay: Replay) -> Replay:
        def run() -> Outputs:
            self.replayed += 1
            return replay()

        return run


def _taped(run: Replay) -> Callable[[], Outputs]:
    made: list[tuple[Tape, Outputs]] = []

    def replay() -> Outputs:
        if made:
            tape, outputs = made[0]
            return tape.again(outputs)
        with Tape() as tape:
            outputs = run()
        made.append((tape, outputs))
        return outputs

    return replay
