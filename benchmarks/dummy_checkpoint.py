"""A checkpoint folder of a true shape without weights: what is read of them is a hole in a file, and takes no disk."""

from __future__ import annotations

import json
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.shapes import BF16_BYTES, transformers_config
from cluster.checkpoint import ARCHITECTURE, ModelConfig, expected_tensors

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# With weights that nobody trained no canvas is sure of itself: each takes as many steps as it may.
NEVER_CONFIDENT = 1e-9


def write_dummy_checkpoint(folder: Path, config: ModelConfig, steps_per_canvas: int) -> None:
    """Everything that Easel and vLLM read before weights; the demo's tokenizer knows only the first few tokens.

    Loaders must make the weights up themselves (vLLM's load_format="dummy").
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(config), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(_generation(config, steps_per_canvas), indent=2))
    _write_hole(folder / "model.safetensors", expected_tensors(config))


def _config(config: ModelConfig) -> dict[str, Any]:
    from transformers.models.gemma4 import Gemma4VisionConfig  # noqa: PLC0415 - dev only

    shape: dict[str, Any] = transformers_config(config).to_dict()
    # vLLM's class always has a vision tower.
    shape["vision_config"] = Gemma4VisionConfig().to_dict()
    return shape | {"architectures": [ARCHITECTURE], "dtype": "bfloat16"}


def _generation(config: ModelConfig, steps_per_canvas: int) -> dict[str, Any]:
    return {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_new_tokens": 4 * config.canvas_tokens,
        "max_denoising_steps": steps_per_canvas,
        "confidence_threshold": NEVER_CONFIDENT,
        "stability_threshold": 1,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_min": 0.4,
        "t_max": 0.8,
    }


def _write_hole(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose header is whole and whose data nobody wrote: zeros where they are read."""
    entries, end_bytes = {}, 0
    for name, shape in shapes.items():
        begin_bytes, end_bytes = end_bytes, end_bytes + BF16_BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin_bytes, end_bytes]}
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end_bytes)
