"""Writes and reads a checkpoint folder in Hugging Face's DiffusionGemma format, official tensor names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.net import Shape, TrainingModel
from models.tasks import CANVAS_TOKENS

MAX_NEW_TOKENS = 128
MAX_POSITIONS = 1024
TRANSFORMERS_VERSION = "5.19.0"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<boi>", "<eoi>", "<image>")
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + m['content'] + '<turn|>' }}{% endfor %}"
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
VISION_HIDDEN = 32


def text_config(shape: Shape) -> dict[str, Any]:
    types = [shape.layer_type(index) for index in range(shape.layers)]
    full = [str(index) for index, kind in enumerate(types) if kind == "full_attention"]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "final_logit_softcapping": shape.softcap,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.dense_intermediate,
        "layer_types": types,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": shape.expert_intermediate,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 0,
        "per_layer_config": {index: {"head_dim": shape.global_head_dim} for index in full},
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": shape.window_tokens,
        "tie_word_embeddings": True,
        "top_k_experts": shape.top_k,
        "use_bidirectional_attention": "vision",
        "vocab_size": shape.vocab_tokens,
    }


def vision_config() -> dict[str, Any]:
    """The smallest tower that the format accepts; it is never trained."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": VISION_HIDDEN,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": VISION_HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": VISION_HIDDEN,
        "max_position_embeddings": 64,
        "model_type": "gemma4_vision",
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
        "standardize": False,
        "use_clipped_linears": False,
    }


def model_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": 5,
        "canvas_length": CANVAS_TOKENS,
        "dtype": "bfloat16",
        "eoi_token_id": 6,
        "image_token_id": 7,
        "initializer_range": 0.02,
        "model_type": "diffusion_gemma",
        "text_config": text_config(shape),
        "tie_word_embeddings": True,
        "transformers_version": TRANSFORMERS_VERSION,
        "vision_config": vision_config(),
    }


def generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": 2,
        "confidence_threshold": 0.005,
        "eos_token_id": 1,
        "max_denoising_steps": 48,
        "max_new_tokens": MAX_NEW_TOKENS,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def tokenizer() -> dict[str, Any]:
    """One token per ASCII character, id = code; the ids below 32 hold the special tokens."""
    names = [*SPECIAL_TOKENS, *(f"<unused{i}>" for i in range(8, 32)), *map(chr, range(32, 127)), "<unk>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [*range(len(SPECIAL_TOKENS)), 127]
    sides = [{"Sequence": {"id": side, "type_id": number}} for number, side in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": names[number], **flags} for number in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sides[:1],
            "pair": sides,
            "special_tokens": {},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {n: i for i, n in enumerate(names)}, "unk_token": "<unk>"},
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "backend": "tokenizers",
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }


def vision_tensors(hidden: int) -> dict[str, Tensor]:
    """A random tower, fixed by its own seed; the format wants it, text never reaches it."""
    random = torch.Generator().manual_seed(0)
    tower, layer = "model.encoder.vision_tower.", "model.encoder.vision_tower.encoder.layers.0."
    norms = ("input", "post_attention", "post_feedforward", "pre_feedforward")
    matrices = [f"mlp.{name}_proj" for name in ("down", "gate", "up")]
    matrices += [f"self_attn.{name}_proj" for name in "koqv"]

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.02

    return {
        "model.encoder.embed_vision.embedding_projection.weight": noise(hidden, VISION_HIDDEN),
        f"{tower}patch_embedder.input_proj.weight": noise(VISION_HIDDEN, 3 * 16 * 16),
        f"{tower}patch_embedder.position_embedding_table": torch.ones(2, 16, VISION_HIDDEN),
        **{f"{layer}{name}_layernorm.weight": torch.ones(VISION_HIDDEN) for name in norms},
        **{f"{layer}self_attn.{name}_norm.weight": torch.ones(VISION_HIDDEN) for name in "kq"},
        **{f"{layer}{name}.linear.weight": noise(VISION_HIDDEN, VISION_HIDDEN) for name in matrices},
    }


def save_checkpoint(model: TrainingModel, folder: Path) -> None:
    """Writes the folder: weights in bfloat16, tied ones once, `layer_scalar` for decoder and encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {DECODER + name: value.detach() for name, value in model.state_dict().items()}
    for name, value in model.state_dict().items():
        if name.endswith("layer_scalar"):
            tensors[ENCODER + name] = value.detach().clone()
    tensors |= vision_tensors(model.shape.hidden)
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in sorted(tensors.items())}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    files = {
        "config.json": model_config(model.shape),
        "generation_config.json": generation_config(),
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def read_shape(folder: Path) -> Shape:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        global_head_dim=config["per_layer_config"]["1"]["head_dim"],
        dense_intermediate=config["intermediate_size"],
        expert_intermediate=config["moe_intermediate_size"],
        experts=config["num_experts"],
        top_k=config["top_k_experts"],
        vocab_tokens=config["vocab_size"],
        window_tokens=config["sliding_window"],
        softcap=config["final_logit_softcapping"],
    )


def load_checkpoint(folder: Path) -> TrainingModel:
    """The training model with the folder's weights, float32."""
    model = TrainingModel(read_shape(folder))
    tensors = load_file(folder / "model.safetensors")
    own = [name for name in tensors if name.startswith(DECODER)]
    model.load_state_dict({name.removeprefix(DECODER): tensors[name].float() for name in own})
    return model
