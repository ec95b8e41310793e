"""Settings: what is allowed, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_values, overlay, parse_settings, router_address, state_dir
from cluster.errors import ConfigError


def test_settings_have_defaults_for_everything_but_the_checkpoint() -> None:
    settings = parse_settings({"checkpoint": "models/tiny"})
    assert (settings.router.port, settings.denoiser.replicas, settings.denoiser.slots) == (8500, 2, 8)


def test_settings_survive_a_trip_through_plain_data() -> None:
    settings = parse_settings({"checkpoint": "x", "state": {"queue_limit": 5}})
    assert parse_settings(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "checkpoint: must be set"),
        ({"checkpoint": "x", "colour": 1}, "colour: unknown setting"),
        ({"checkpoint": "x", "router": {"prot": 1}}, "router.prot: unknown setting"),
        ({"checkpoint": "x", "router": 5}, "router: must be a section of settings, is 5"),
        ({"checkpoint": "x", "router": {"port": 70000}}, "router.port: 70000 is not allowed"),
        ({"checkpoint": "x", "denoiser": {"replicas": 0}}, "denoiser.replicas: 0 is not allowed"),
        ({"checkpoint": "x", "denoiser": {"engine": "tpu"}}, "denoiser.engine: 'tpu' is not allowed"),
        ({"checkpoint": "x", "denoiser": {"tp": 0}}, "denoiser.tp: 0 is not allowed"),
        (
            {"checkpoint": "x", "denoiser": {"tp": 2, "engine": "fake"}},
            "denoiser.tp: 2 is not allowed: the fake engine",
        ),
        ({"checkpoint": "x", "denoiser": {"placement": "near"}}, "denoiser.placement: 'near' is not allowed"),
        ({"checkpoint": "x", "denoiser": {"tp": 2, "num_gpus": 0.5}}, "denoiser.num_gpus: 0.5 is not allowed"),
        ({"checkpoint": "x", "state": {"namespace": "a b"}}, "state.namespace: 'a b' is not allowed"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(values)
    assert str(caught.value).startswith(named)


def test_every_bad_setting_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings({"checkpoint": "x", "router": {"port": -1}, "denoiser": {"slots": 0}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot be read"), ("a: [", "is not YAML"), ("- 1", "must be a mapping")]
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "easel.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_values(path)


def test_a_file_of_settings_is_read(tmp_path: Path) -> None:
    path = tmp_path / "easel.yaml"
    path.write_text("checkpoint: /models/x\nrouter: {port: 1234}\n")
    assert parse_settings(load_values(path)).router.port == 1234


def test_what_is_given_goes_over_what_is_in_the_file() -> None:
    values = {"checkpoint": "a", "router": {"port": 1, "host": "h"}}
    over = {"checkpoint": None, "router": {"port": 2, "host": None}, "state": {"url": None}}
    assert overlay(values, over) == {"checkpoint": "a", "router": {"port": 2, "host": "h"}, "state": {}}


def test_the_state_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_HOME", "/somewhere")
    assert state_dir() == Path("/somewhere")
    monkeypatch.delenv("EASEL_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_dir() == Path("/xdg/easel")


def test_the_address_comes_from_the_environment_or_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_ADDRESS", "host:1")
    assert router_address() == "host:1"
    monkeypatch.delenv("EASEL_ADDRESS")
    assert router_address() is None
