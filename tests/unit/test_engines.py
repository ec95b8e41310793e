"""The table of engines: the documentation holds it, the settings obey it, and every line of it is held by a test."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.config import DenoiserSettings, parse_settings
from cluster.engines import ENGINES, FAKE, TITLES, TORCH, VLLM, EngineTraits, table
from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = "tests/contract/test_engine_contract.py"
# The test that runs against every engine, or against the code, and fails when a line of the table is not so.
HELD_BY = {
    "images": f"{CONTRACT}::test_images_are_taken_as_the_table_says",
    "drafts": f"{CONTRACT}::test_drafts_come_only_when_asked_for",
    "seeds": f"{CONTRACT}::test_a_job_does_not_depend_on_its_batch_mates",
    "canvas_checkpoints": f"{CONTRACT}::test_a_checkpoint_resumes_bit_for_bit_in_another_engine",
    "ranks": "tests/unit/test_engines.py::test_settings_that_an_engine_cannot_do_are_refused_by_name",
    "prefix_reuse": f"{CONTRACT}::test_prefixes_are_reused_as_the_table_says",
    "exact_beyond_window": "tests/unit/test_torch_model.py::test_logits_are_the_references_at_every_context_length",
    "dtypes": "tests/unit/test_engines.py::test_the_torch_engine_has_the_dtypes_and_devices_of_the_table",
    "devices": "tests/unit/test_engines.py::test_the_torch_engine_has_the_dtypes_and_devices_of_the_table",
    "quantizations": "tests/unit/test_engines.py::test_the_settings_offer_the_quantisations_of_the_table",
}


def test_the_documentation_holds_the_table_as_it_is_printed() -> None:
    assert table() in (ROOT / "docs" / "engines.md").read_text()


def test_every_line_of_the_table_is_held_by_a_test_that_exists() -> None:
    traits = {field.name for field in fields(EngineTraits)} - {"name", "purpose"}
    assert traits == set(TITLES) == set(HELD_BY)
    for held_by in HELD_BY.values():
        file, _, name = held_by.partition("::")
        named = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert name in named, held_by


def test_every_engine_of_the_settings_is_in_the_table() -> None:
    assert set(get_args(DenoiserSettings.model_fields["engine"].annotation)) <= set(ENGINES)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=str)
def test_what_an_engine_lacks_is_refused_with_the_engines_name(engine: EngineTraits) -> None:
    bare = replace(engine, ranks=False, canvas_checkpoints=False, dtypes=("float32",), devices=("cpu",))
    for setting, value in (("tp", 2), ("checkpoint_every_steps", 1), ("dtype", "bfloat16"), ("device", "cuda")):
        said = bare.refuses(setting, value)
        assert said is not None
        assert engine.name in said
    for setting, value in (("tp", 1), ("checkpoint_every_steps", 0), ("dtype", "float32"), ("device", "auto")):
        assert bare.refuses(setting, value) is None


def test_settings_that_an_engine_cannot_do_are_refused_by_name() -> None:
    assert (FAKE.ranks, TORCH.ranks) == (False, True)
    parse_settings({"checkpoint": "c", "denoiser": {"engine": "torch", "tp": 2}})
    with pytest.raises(ConfigError, match=r"denoiser.tp: 2 is not allowed: the fake engine runs one rank"):
        parse_settings({"checkpoint": "c", "denoiser": {"engine": "fake", "tp": 2}})


def test_the_torch_engine_has_the_dtypes_and_devices_of_the_table() -> None:
    from deployments.engine.torch_tp.engine import DEVICES, DTYPES

    assert set(DTYPES) == set(TORCH.dtypes)
    assert set(DEVICES) == {*TORCH.devices, "auto"}


def test_the_settings_offer_the_quantisations_of_the_table() -> None:
    assert FAKE.quantizations == TORCH.quantizations == ()
    section: Any = DenoiserSettings.model_fields.get("vllm")
    if section is not None:
        offered = section.annotation.model_fields["quantization"].annotation
        assert {word for choices in get_args(offered) for word in get_args(choices)} == set(VLLM.quantizations)
