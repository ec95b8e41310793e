"""Reading a checkpoint folder: what is taken from where, and one clear line for each way it can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import Checkpoint, LayerConfig, _model_config, expected_tensors, read_checkpoint
from cluster.core import VisionCard
from cluster.errors import CheckpointError
from cluster.json_fields import JsonFields
from tests.oracle import copy_checkpoint, some_checkpoint

Header = dict[str, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = some_checkpoint()
    if source is None:
        pytest.skip("no checkpoint is here")
    return copy_checkpoint(source, tmp_path / "model")


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def edit_header(folder: Path, change: Callable[[Header], object]) -> None:
    """Rewrites the header of the weight file and leaves its data alone."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header: Header = json.loads(raw[8 : 8 + size])
    change(header)
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])


def split_into_shards(folder: Path) -> None:
    """Two weight files with an index, the second with every tensor of the encoder."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header: Header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    parts: tuple[Header, Header] = ({}, {})
    for name, entry in header.items():
        parts["encoder" in name][name] = entry
    weight_map = {}
    for number, part in enumerate(parts):
        shard, data, entries = f"model-{number}.safetensors", b"", {}
        for name, entry in part.items():
            begin, end = entry["data_offsets"]
            piece = raw[8 + size + begin : 8 + size + end]
            entries[name] = entry | {"data_offsets": [len(data), len(data) + len(piece)]}
            data += piece
            weight_map[name] = shard
        text = json.dumps(entries).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + data)
    file.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_numbers_come_from_the_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    generation = json.loads((folder / "generation_config.json").read_text())
    found = read_checkpoint(folder)
    card, defaults = found.card, found.card.defaults
    assert (card.name, card.canvas_tokens, card.vocab_size) == ("model", config["canvas_length"], text["vocab_size"])
    assert card.max_context_tokens == text["max_position_embeddings"]
    assert (card.bos_token_id, card.pad_token_id, card.eos_token_ids) == (2, 0, (1,))
    assert defaults.entropy_bound == generation["sampler_config"]["entropy_bound"]
    for name in ("t_min", "t_max", "max_new_tokens", "max_denoising_steps", "stability_threshold"):
        assert getattr(defaults, name) == generation[name]
    assert defaults.seed == 0
    assert found.config.logit_softcap == 30.0
    assert len(found.config.layers) == text["num_hidden_layers"]


def test_a_vision_part_is_known_by_its_description_its_weights_its_token_and_its_processor(folder: Path) -> None:
    assert read_checkpoint(folder).card.vision is None, "nothing says how images are prepared"
    (folder / "processor_config.json").write_text("{}")
    assert read_checkpoint(folder).card.vision == VisionCard(image_token_id=7, tokens_per_image=282)
    edit(folder, "config.json", lambda values: values["vision_config"].update(default_output_length=70))
    assert read_checkpoint(folder).card.vision == VisionCard(image_token_id=7, tokens_per_image=72)
    edit(folder, "config.json", lambda values: values.pop("image_token_id"))
    assert read_checkpoint(folder).card.vision is None, "the default is not in this vocabulary"
    edit(folder, "config.json", lambda values: values.update(image_token_id=7, vision_config=None))
    assert read_checkpoint(folder).card.vision is None


def test_a_checkpoint_without_weights_for_vision_has_no_vision_part(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{}")
    edit_header(
        folder,
        lambda header: [
            header.update({name.replace("vision_tower", "other"): header.pop(name)})
            for name in list(header)
            if "vision_tower" in name
        ],
    )
    assert read_checkpoint(folder).card.vision is None


def test_a_list_of_eos_tokens_is_kept_whole(folder: Path) -> None:
    edit(folder, "generation_config.json", lambda values: values.update(eos_token_id=[1, 106, 50]))
    assert read_checkpoint(folder).card.eos_token_ids == (1, 106, 50)


def test_older_keys_give_the_same_layers_as_per_layer_config(folder: Path) -> None:
    before = read_checkpoint(folder).config

    def older(values: dict[str, Any]) -> None:
        full = values["text_config"].pop("per_layer_config")
        values["text_config"]["global_head_dim"] = full["1"]["head_dim"]
        values["text_config"]["num_global_key_value_heads"] = before.layers[1].kv_heads

    edit(folder, "config.json", older)
    assert read_checkpoint(folder).config == before


def test_layers_of_the_published_model_are_understood(folder: Path) -> None:
    def published(values: dict[str, Any]) -> None:
        kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
        values["text_config"].update(
            num_hidden_layers=30, layer_types=kinds, num_attention_heads=16, num_key_value_heads=8, head_dim=256
        )
        values["text_config"].update(num_global_key_value_heads=2)
        values["text_config"].pop("per_layer_config")

    edit(folder, "config.json", published)
    assert "tensors are missing" in refusal(folder) or "has shape" in refusal(folder)
    layers = _model_config(JsonFields.of_file(folder / "config.json")).layers
    assert layers[4] == LayerConfig(is_sliding=True, head_dim=256, kv_heads=8)
    assert layers[5] == LayerConfig(is_sliding=False, head_dim=512, kv_heads=2)
    assert [index for index, layer in enumerate(layers) if not layer.is_sliding] == [5, 11, 17, 23, 29]


def test_shards_read_like_one_file(folder: Path) -> None:
    whole = read_checkpoint(folder)
    split_into_shards(folder)
    shards = read_checkpoint(folder)
    assert shards.config == whole.config
    assert {name: entry.shape for name, entry in shards.tensors.items()} == {
        name: entry.shape for name, entry in whole.tensors.items()
    }
    assert {entry.file.name for entry in shards.tensors.values()} == {"model-0.safetensors", "model-1.safetensors"}


def versions(first: Path, second: Path) -> tuple[str, str]:
    return read_checkpoint(first).card.version, read_checkpoint(second).card.version


def test_a_copy_has_the_same_version_and_a_change_another(folder: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(folder, tmp_path / "copy")
    first, second = versions(folder, other)
    assert first == second
    assert len(first) == 16
    edit(other, "generation_config.json", lambda values: values.update(t_max=0.9))
    first, second = versions(folder, other)
    assert first != second


def test_another_training_of_the_same_shape_has_another_version(folder: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(folder, tmp_path / "copy")
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    first, second = versions(folder, other)
    assert first != second


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    message = refusal(folder)
    assert file in message
    assert "missing" in message


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_bad_json_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert file in refusal(folder)


BAD_CONFIG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another architecture": (lambda v: v.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "no text part": (lambda v: v.pop("text_config"), "text_config is missing"),
    "another activation": (lambda v: v["text_config"].update(hidden_activation="silu"), "hidden_activation is 'silu'"),
    "attention bias": (lambda v: v["text_config"].update(attention_bias=True), "attention_bias is True"),
    "a bidirectional encoder": (lambda v: v["text_config"].update(use_bidirectional_attention="all"), "'all'"),
    "an untied head": (lambda v: v.update(tie_word_embeddings=False), "tie_word_embeddings is False"),
    "no experts": (lambda v: v["text_config"].update(num_experts=None), "num_experts is None"),
    "too many experts per token": (lambda v: v["text_config"].update(top_k_experts=99), "top_k_experts is 99"),
    "another rope": (
        lambda v: v["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"),
        "rope_parameters.full_attention.rope_type is 'yarn'",
    ),
    "a part of default rope": (
        lambda v: v["text_config"]["rope_parameters"]["sliding_attention"].update(partial_rotary_factor=0.5),
        "sliding_attention.partial_rotary_factor is 0.5",
    ),
    "a count as text": (lambda v: v["text_config"].update(hidden_size="128"), "hidden_size is '128'"),
    "a boolean count": (lambda v: v["text_config"].update(hidden_size=True), "hidden_size is True"),
    "layer types too few": (lambda v: v["text_config"]["layer_types"].pop(), "layer_types"),
    "a sliding last layer": (
        lambda v: v["text_config"].update(layer_types=["full_attention"] * 3 + ["sliding_attention"]),
        "last layer",
    ),
    "an unknown layer override": (
        lambda v: v["text_config"]["per_layer_config"]["1"].update(sliding_window=7),
        "per_layer_config.1.sliding_window is 7",
    ),
    "an override of no layer": (
        lambda v: v["text_config"]["per_layer_config"].update({"9": {"head_dim": 8}}),
        "per_layer_config.9",
    ),
    "layers of one type that differ": (
        lambda v: v["text_config"]["per_layer_config"].update({"3": {"head_dim": 128}}),
        "layer 3",
    ),
    "heads that do not divide": (lambda v: v["text_config"].update(num_key_value_heads=3), "num_attention_heads"),
    "no room for a canvas": (lambda v: v["text_config"].update(max_position_embeddings=8), "max_position_embeddings"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_a_config_that_cannot_be_run_is_refused_by_field(folder: Path, case: str) -> None:
    change, expected = BAD_CONFIG[case]
    edit(folder, "config.json", change)
    message = refusal(folder)
    assert "config.json" in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", None),
        ("max_denoising_steps", 0),
        ("t_max", 0),
        ("t_min", 9.0),
        ("t_min", -0.1),
        ("confidence_threshold", "low"),
        ("stability_threshold", -1),
        ("eos_token_id", [1, 4000]),
        ("eos_token_id", []),
        ("pad_token_id", None),
        ("sampler_config", {"entropy_bound": float("nan")}),
    ],
)
def test_a_default_that_is_out_of_range_is_refused(folder: Path, name: str, value: object) -> None:
    edit(folder, "generation_config.json", lambda values: values.update({name: value}))
    message = refusal(folder)
    assert "generation_config.json" in message
    assert name in message


@pytest.mark.parametrize("keep_bytes", [0, 5, 8, 2000, -1])
def test_a_truncated_weight_file_is_refused(folder: Path, keep_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    message = refusal(folder)
    assert str(file) in message
    assert "truncated" in message


def test_a_weight_file_that_is_something_else_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 4\n")
    assert "not a safetensors file" in refusal(folder)


def test_missing_tensors_are_counted_and_the_first_is_named(folder: Path) -> None:
    def drop(header: Header) -> None:
        for name in [name for name in header if ".layers.2." in name and "decoder" in name]:
            header["x" + name] = header.pop(name)

    edit_header(folder, drop)
    message = refusal(folder)
    assert "22 of" in message
    assert "model.decoder.layers.2.input_layernorm.weight" in message


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit(folder, "config.json", lambda values: values["text_config"].update(intermediate_size=64))
    message = refusal(folder)
    assert "[64, 128]" in message
    assert "model.safetensors" in message


def test_a_dtype_that_is_not_loaded_is_refused(folder: Path) -> None:
    edit_header(folder, lambda header: header["model.decoder.norm.weight"].update(dtype="F8_E4M3"))
    assert "F8_E4M3" in refusal(folder)


def test_offsets_that_do_not_fit_the_shape_are_refused(folder: Path) -> None:
    edit_header(folder, lambda header: header["model.decoder.norm.weight"].update(shape=[4]))
    assert "data_offsets" in refusal(folder)


def test_encoder_and_decoder_scalars_that_differ_are_refused(folder: Path) -> None:
    def point_elsewhere(header: Header) -> None:
        name = "model.encoder.language_model.layers.1.layer_scalar"
        start, _ = header["model.decoder.norm.weight"]["data_offsets"]
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start, start + end - begin]

    edit_header(folder, point_elsewhere)
    message = refusal(folder)
    assert "layers.1.layer_scalar" in message


def test_a_shard_that_the_index_names_must_be_there(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in refusal(folder)


@pytest.mark.parametrize("entry", ["../../etc/passwd", 7])
def test_an_index_may_name_only_files_of_its_folder(folder: Path, entry: object) -> None:
    split_into_shards(folder)
    edit(folder, "model.safetensors.index.json", lambda values: values["weight_map"].update(x=entry))
    assert "weight_map" in refusal(folder)


def test_every_tensor_that_is_expected_is_in_the_file(folder: Path) -> None:
    found: Checkpoint = read_checkpoint(folder)
    assert set(expected_tensors(found.config)) <= set(found.tensors)
    assert replace(found.config) == found.config
    shutil.rmtree(folder)
