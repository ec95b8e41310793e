"""A checkpoint that sees: the shape of the tiny one, random weights, and what prepares its images.

The weights of the text part are random as well: what was trained has never seen an image, and answers it with padding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.vllm.driving import changed_checkpoint

# The fewest that the image processor allows, so that an image fits a small context.
TOKENS_PER_IMAGE = 70
POOLING = 3
# An image may be as long as all its positions in a row.
POSITIONS = 256
WINDOW = 512
TOKENS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
# The processor asks for the names of sounds even where a model hears none.
SOUND = {"audio_token": "<unused8>", "boa_token": "<unused8>", "eoa_token": "<unused8>"}
VIDEO_TOKEN, UNUSED = "<|video|>", "<unused9>"
PROCESSOR: dict[str, Any] = {
    "processor_class": "Gemma4Processor",
    "image_seq_length": TOKENS_PER_IMAGE,
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "max_soft_tokens": TOKENS_PER_IMAGE,
        "patch_size": 16,
        "pooling_kernel_size": POOLING,
    },
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
}


def seeing_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes it. Its window holds every context, so that what vLLM does beyond it changes nothing."""
    path = changed_checkpoint(folder, sliding_window=WINDOW)
    _edit(path / "config.json", _config)
    _edit(path / "tokenizer.json", _name_video)
    _edit(path / "tokenizer_config.json", lambda values: values.update(extra_special_tokens=TOKENS | SOUND))
    (path / "processor_config.json").write_text(json.dumps(PROCESSOR))
    _draw(path / "model.safetensors", seed)
    return path


def _config(values: dict[str, Any]) -> None:
    values["vision_config"] |= {
        "default_output_length": TOKENS_PER_IMAGE,
        "position_embedding_size": POSITIONS,
        # vLLM computes the tower in this, whatever it is told for the rest.
        "dtype": "float32",
    }


def _name_video(values: dict[str, Any]) -> None:
    """The processor counts this token in what it has prepared; without it, every unknown one counts."""
    words = values["model"]["vocab"]
    words[VIDEO_TOKEN] = words.pop(UNUSED)
    values["added_tokens"].append(values["added_tokens"][0] | {"id": words[VIDEO_TOKEN], "content": VIDEO_TOKEN})


def _edit(path: Path, change: Any) -> None:  # noqa: ANN401
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _draw(path: Path, seed: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    weights = load_file(path)
    for name, weight in weights.items():
        shape = list(weight.shape)
        if name.endswith("position_embedding_table"):
            shape[1] = POSITIONS
        if len(shape) > 1:
            weights[name] = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(weight.dtype)
    save_file(weights, path, metadata={"format": "pt"})
