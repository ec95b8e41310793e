"""Python runs this at the start of every process that has this folder on PYTHONPATH: vLLM without a GPU.

vLLM's kernels for DiffusionGemma are written in Triton, which has no compiler for CPUs in its release; its interpreter
runs them. What vLLM looks for before it believes in Triton is put in place when `vllm` is first imported, whichever
process that is: the test, vLLM's engine process, its workers, a replica under Ray.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SETTINGS = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


class PlaceholderDriver:
    """A Triton driver that exists and compiles nothing: the interpreter asks it only for its names."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:  # noqa: ANN401
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 32)

    def get_active_torch_device(self) -> Any:  # noqa: ANN401
        import torch

        return torch.device("cpu")


class BeforeVllm(importlib.abc.MetaPathFinder):
    """Finds nothing; prepares Triton and torchvision when vllm is looked for."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ANN401
        if name == "vllm":
            sys.meta_path.remove(self)
            prepare()
        return None


def prepare() -> None:
    import torch
    from triton.backends import Backend, backends
    from triton.runtime.driver import driver

    backends.setdefault("cpu", Backend(None, PlaceholderDriver))
    driver.set_active(PlaceholderDriver())
    # This torchvision was built for CUDA: without these definitions its import fails on a CPU build of torch.
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", QNMS):
        torch.library.define(f"torchvision::{schema.split('(', 1)[0]}", "(" + schema.split("(", 1)[1])


QNMS = "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

for key, value in SETTINGS.items():
    os.environ.setdefault(key, value)
sys.meta_path.insert(0, BeforeVllm())
