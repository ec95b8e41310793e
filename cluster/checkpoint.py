"""What a DiffusionGemma checkpoint folder holds, read without torch: JSON files and the headers of weight files.

Everything is checked before a byte of a weight matrix is loaded; what is wrong becomes one CheckpointError line
that names the file, the field or tensor, and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.core import ModelCard, SamplingParams, VisionCard
from cluster.errors import CheckpointError, ConfigError
from cluster.json_fields import JsonFields
from cluster.weight_files import DTYPE_BYTES, TensorEntry, find_weight_files, read_weight_file

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
# transformers keeps this number as a class attribute, so save_pretrained leaves it out of config.json.
DEFAULT_SOFTCAP = 30.0
# What DiffusionGemmaTextConfig takes when neither per_layer_config nor global_head_dim is given.
DEFAULT_GLOBAL_HEAD_DIM = 512
# What DiffusionGemmaConfig and Gemma4VisionConfig take when config.json leaves these numbers out.
DEFAULT_IMAGE_TOKEN_ID = 258_880
DEFAULT_POSITIONS_PER_IMAGE = 280
IMAGE_FRAME_TOKENS = 2
# Size, patches and scale of what the vision tower gets; a checkpoint has one of these.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
VISION_PREFIX = "model.encoder.vision_tower."


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions of one layer type: `rotated_fraction` of a head's angles turn, the rest stay at 0."""

    theta: float
    rotated_fraction: float
    factor: float


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Attention shape of a layer. Full-attention layers have no v_proj: values are their key projection."""

    is_sliding: bool
    head_dim: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture numbers of config.json (text part), checked."""

    vocab_size: int
    canvas_tokens: int
    hidden_size: int
    intermediate_size: int
    expert_intermediate_size: int
    experts: int
    experts_per_token: int
    attention_heads: int
    sliding_window_tokens: int
    max_position_tokens: int
    rms_norm_eps: float
    logit_softcap: float
    layers: tuple[LayerConfig, ...]
    sliding_rope: RopeConfig
    full_rope: RopeConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was read and found whole."""

    path: Path
    card: ModelCard
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks a folder. Raises CheckpointError: one line for the person who set the path."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: no such folder; give a Hugging Face checkpoint folder")
    folder = folder.resolve()
    fields = JsonFields.of_file(folder / CONFIG_FILE)
    config = _model_config(fields)
    generation = JsonFields.of_file(folder / GENERATION_FILE)
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder / TOKENIZER_FILE}: missing; copy it from the original checkpoint")
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, GENERATION_FILE):
        digest.update((folder / name).read_bytes())
    tensors: dict[str, TensorEntry] = {}
    for file in find_weight_files(folder):
        weights = read_weight_file(file)
        tensors.update(weights.tensors)
        digest.update(weights.fingerprint)
    _check_tensors(folder, config, tensors)
    card = _card(folder.name, digest.hexdigest()[:16], config, generation)
    card = replace(card, vision=_vision(folder, fields, config.vocab_size, tensors))
    return Checkpoint(path=folder, card=card, config=config, tensors=tensors)


def _model_config(fields: JsonFields) -> ModelConfig:
    names = fields.values.get("architectures")
    if names != [ARCHITECTURE] and not (names is None and fields.values.get("model_type") == "diffusion_gemma"):
        fields.refuse("architectures", f"Easel serves only {ARCHITECTURE} checkpoints")
    text = fields.child("text_config")
    text.require("hidden_activation", "gelu_pytorch_tanh")
    text.require("attention_bias", False, None)
    text.require("use_bidirectional_attention", "vision", None)
    for owner in (fields, text):
        owner.require("tie_word_embeddings", True, None)
    rope = text.child("rope_parameters")
    config = ModelConfig(
        vocab_size=text.integer("vocab_size", 2),
        canvas_tokens=fields.integer("canvas_length"),
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        expert_intermediate_size=text.integer("moe_intermediate_size"),
        experts=text.integer("num_experts"),
        experts_per_token=text.integer("top_k_experts"),
        attention_heads=text.integer("num_attention_heads"),
        sliding_window_tokens=text.integer("sliding_window", 2),
        max_position_tokens=text.integer("max_position_embeddings"),
        rms_norm_eps=text.number("rms_norm_eps"),
        logit_softcap=text.number("final_logit_softcapping", default=DEFAULT_SOFTCAP),
        layers=_layers(text),
        sliding_rope=_rope(rope.child("sliding_attention")),
        full_rope=_rope(rope.child("full_attention")),
    )
    _check_divisions(text, config)
    return config


def _check_divisions(text: JsonFields, config: ModelConfig) -> None:
    if config.experts_per_token > config.experts:
        text.refuse("top_k_experts", f"it must be at most num_experts = {config.experts}")
    if config.canvas_tokens > config.max_position_tokens:
        text.refuse("max_position_embeddings", f"it must hold a canvas of {config.canvas_tokens} tokens")
    first = {layer.is_sliding: layer for layer in reversed(config.layers)}
    for index, layer in enumerate(config.layers):
        if config.attention_heads % layer.kv_heads:
            rule = f"the {layer.kv_heads} key-value heads of layer {index} must divide it"
            text.refuse("num_attention_heads", rule)
        if layer != first[layer.is_sliding]:
            text.refuse("per_layer_config", f"layer {index} must have the shape of the others of its type")
        if layer.head_dim % 2:
            text.refuse("head_dim", f"layer {index} has head_dim {layer.head_dim}, which must be even")


def _layers(text: JsonFields) -> tuple[LayerConfig, ...]:
    count = text.integer("num_hidden_layers")
    kinds = text.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        text.refuse("layer_types", f"it must list {count} layer types, one per layer")
    if any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        text.refuse("layer_types", "each must be sliding_attention or full_attention")
    if kinds[-1] != "full_attention":
        text.refuse("layer_types", "the last layer must be full_attention")
    head_dim, kv_heads = text.integer("head_dim"), text.integer("num_key_value_heads")
    overrides = _layer_overrides(text, kinds)
    return tuple(
        LayerConfig(
            is_sliding=kind == "sliding_attention",
            head_dim=overrides.get(index, {}).get("head_dim", head_dim),
            kv_heads=overrides.get(index, {}).get("num_key_value_heads", kv_heads),
        )
        for index, kind in enumerate(kinds)
    )


def _layer_overrides(text: JsonFields, kinds: list[str]) -> dict[int, dict[str, int]]:
    """Layer -> its own numbers, from per_layer_config or the older keys for all full-attention layers."""
    if not text.has("per_layer_config"):
        older = {"head_dim": text.integer("global_head_dim", default=DEFAULT_GLOBAL_HEAD_DIM)}
        if text.has("num_global_key_value_heads"):
            older["num_key_value_heads"] = text.integer("num_global_key_value_heads")
        return {index: older for index, kind in enumerate(kinds) if kind == "full_attention"}
    per_layer = text.child("per_layer_config")
    overrides = {}
    for key in per_layer.values:
        if not key.isdecimal() or int(key) >= len(kinds):
            per_layer.refuse(key, f"keys must be layer numbers below {len(kinds)}")
        own = per_layer.child(key)
        for name in set(own.values) - {"head_dim", "num_key_value_heads"}:
            own.refuse(name, "a layer can have only its own head_dim and num_key_value_heads")
        overrides[int(key)] = {name: own.integer(name) for name in own.values if own.has(name)}
    return overrides


def _rope(fields: JsonFields) -> RopeConfig:
    fields.require("rope_type", "default", "proportional")
    proportional = fields.values["rope_type"] == "proportional"
    fraction = fields.number("partial_rotary_factor", default=1.0)
    if fraction > 1.0 or (fraction < 1.0 and not proportional):
        fields.refuse("partial_rotary_factor", "it must be 1, or at most 1 with rope_type proportional")
    factor = fields.number("factor", default=1.0) if proportional else 1.0
    return RopeConfig(theta=fields.number("rope_theta"), rotated_fraction=fraction, factor=factor)


def _card(name: str, version: str, config: ModelConfig, generation: JsonFields) -> ModelCard:
    vocab_size = config.vocab_size
    has_bos = generation.has("bos_token_id")
    return ModelCard(
        name=name,
        version=version,
        vocab_size=vocab_size,
        canvas_tokens=config.canvas_tokens,
        max_context_tokens=config.max_position_tokens,
        bos_token_id=generation.token_ids("bos_token_id", vocab_size)[0] if has_bos else None,
        pad_token_id=generation.token_ids("pad_token_id", vocab_size)[0],
        eos_token_ids=generation.token_ids("eos_token_id", vocab_size),
        defaults=_defaults(generation),
    )


def _vision(folder: Path, fields: JsonFields, vocab_size: int, tensors: Mapping[str, TensorEntry]) -> VisionCard | None:
    """None for a checkpoint that describes no vision tower, has no weights for it, no token for an image, or does not
    say how images are prepared."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    if not fields.has("vision_config") or not any(name.startswith(VISION_PREFIX) for name in tensors):
        return None
    image_token_id = fields.integer("image_token_id", 0, default=DEFAULT_IMAGE_TOKEN_ID)
    if image_token_id >= vocab_size:
        return None
    positions = fields.child("vision_config").integer("default_output_length", default=DEFAULT_POSITIONS_PER_IMAGE)
    return VisionCard(image_token_id, positions + IMAGE_FRAME_TOKENS)


def _defaults(generation: JsonFields) -> SamplingParams:
    t_max = generation.number("t_max")
    t_min = 0.0 if generation.values.get("t_min") == 0 else generation.number("t_min")
    if t_min > t_max:
        generation.refuse("t_min", f"it must be in [0, t_max = {t_max:g}]")
    return SamplingParams(
        seed=0,
        max_new_tokens=generation.integer("max_new_tokens"),
        max_denoising_steps=generation.integer("max_denoising_steps"),
        entropy_bound=generation.child("sampler_config").number("entropy_bound"),
        t_min=t_min,
        t_max=t_max,
        confidence_threshold=generation.number("confidence_threshold"),
        stability_threshold=generation.integer("stability_threshold", 0),
    )


def check_degree(config: ModelConfig, world: int) -> None:
    """Raises ConfigError, naming the numbers, for a tensor-parallel degree that this model cannot be cut to."""
    heads = config.attention_heads
    if world < 1 or heads % world:
        allowed = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        raise ConfigError(f"the tensor-parallel degree is {world}; the model's {heads} attention heads allow {allowed}")
    sizes = {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.expert_intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size < world:
            raise ConfigError(f"the tensor-parallel degree is {world}; the model's {name} allows at most {size}")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor that the text part needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (config.vocab_size, hidden),
        "model.decoder.norm.weight": (hidden,),
        "model.decoder.self_conditioning.pre_norm.weight": (hidden,),
    }
    shapes |= _gated_mlp("model.decoder.self_conditioning", hidden, config.intermediate_size)
    for index, layer in enumerate(config.layers):
        shapes |= _layer_tensors(f"model.decoder.layers.{index}", config, layer)
        shapes[f"model.encoder.language_model.layers.{index}.layer_scalar"] = (1,)
    return shapes


def _gated_mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _layer_tensors(prefix: str, config: ModelConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    hidden, experts, inner = config.hidden_size, config.experts, config.expert_intermediate_size
    queries, keys = config.attention_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
    )
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{norm}.weight": (hidden,) for norm in norms}
    shapes |= {
        f"{prefix}.layer_scalar": (1,),
        f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}.self_attn.q_norm.weight": (layer.head_dim,),
        f"{prefix}.self_attn.k_norm.weight": (layer.head_dim,),
        f"{prefix}.router.proj.weight": (experts, hidden),
        f"{prefix}.router.scale": (hidden,),
        f"{prefix}.router.per_expert_scale": (experts,),
        f"{prefix}.experts.gate_up_proj": (experts, 2 * inner, hidden),
        f"{prefix}.experts.down_proj": (experts, hidden, inner),
    }
    if layer.is_sliding:
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
    return shapes | _gated_mlp(f"{prefix}.mlp", hidden, config.intermediate_size)


def _check_tensors(folder: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry]) -> None:
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}; "
            "a weight file is not there, or does not belong to this config.json"
        )
    for name, shape in expected.items():
        entry = tensors[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}; "
                "use the config.json that came with these weights"
            )
        if entry.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{entry.file}: {name} has dtype {entry.dtype}; Easel loads only {', '.join(DTYPE_BYTES)}"
            )
    for index in range(len(config.layers)):
        _check_scalars_agree(tensors, index)


def _check_scalars_agree(tensors: Mapping[str, TensorEntry], index: int) -> None:
    """Encoder and decoder rows share a forward, which is exact only if both layer_scalar copies are equal."""
    ours = f"model.decoder.layers.{index}.layer_scalar"
    theirs = f"model.encoder.language_model.layers.{index}.layer_scalar"
    decoder, encoder = tensors[ours].read_scalar(), tensors[theirs].read_scalar()
    if decoder != encoder:
        raise CheckpointError(
            f"{tensors[theirs].file}: {theirs} is {encoder:g} but {ours} is {decoder:g}; Easel runs encoder "
            "and decoder as one model, so use a checkpoint where they are equal"
        )
