"""`easel config`, and settings from the environment."""

from __future__ import annotations

import json

import pytest
import yaml

from cluster.config import Settings, environment_values, parse_settings
from cluster.embedded import UpOptions, chosen_values
from cluster.errors import ConfigError
from tests.unit.commands import invoke


def test_the_printed_settings_are_those_that_a_cluster_would_start_with() -> None:
    printed = invoke("config")
    assert printed.exit_code == 0
    assert parse_settings(yaml.safe_load(printed.output)) == parse_settings(chosen_values(UpOptions()))


def test_the_environment_goes_above_the_file_and_the_options_above_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "easel.yaml"
    file.write_text("router: {port: 1000, replicas: 3}\ndenoiser: {slots: 2}\n")
    monkeypatch.setenv("EASEL__ROUTER__PORT", "2000")
    monkeypatch.setenv("EASEL__DENOISER__SLOTS", "4")
    settings = parse_settings(chosen_values(UpOptions(config=str(file), slots=6)))
    assert (settings.router.port, settings.router.replicas, settings.denoiser.slots) == (2000, 3, 6)
    assert yaml.safe_load(invoke("config", "--config", str(file)).output)["denoiser"]["slots"] == 4


def test_a_structured_setting_is_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL__ROUTER__LABEL_SELECTOR", '{"easel/role": "router"}')
    assert environment_values() == {"router": {"label_selector": {"easel/role": "router"}}}
    monkeypatch.setenv("EASEL__ROUTER__LABEL_SELECTOR", "{role")
    with pytest.raises(ConfigError, match="EASEL__ROUTER__LABEL_SELECTOR: begins like JSON"):
        environment_values()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("EASEL__ROUTER__PROT", "1", "EASEL__ROUTER__PROT: no such setting"),
        ("EASEL__ROUTERS__PORT", "1", "EASEL__ROUTERS__PORT: no such setting"),
        ("EASEL__ROUTER", "1", "EASEL__ROUTER: is a section"),
        ("EASEL__ROUTER__PORT__X", "1", "EASEL__ROUTER__PORT__X: no such setting"),
        ("EASEL__ROUTER__PORT", "many", "router.port: 'many' is not allowed"),
        ("EASEL__STATE__LEASE_MS", "1", "state.lease_ms: '1' is not allowed"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    refused = invoke("config", "--check")
    assert refused.exit_code == 2
    assert said in refused.output


def test_a_check_says_nothing_when_all_is_well() -> None:
    checked = invoke("config", "--check")
    assert (checked.exit_code, checked.output) == (0, "")


def test_no_password_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL__STATE__URL", "redis+sentinel://easel:s3cret@host:26379/easel/0?sentinel_password=t0p")
    printed = invoke("config").output
    assert "host:26379" in printed
    assert "s3cret" not in printed
    assert "t0p" not in printed


def test_the_schema_names_every_setting() -> None:
    schema = json.loads(invoke("config", "--schema").output)
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert "max_connection_age_s" in schema["$defs"]["RouterSettings"]["properties"]
