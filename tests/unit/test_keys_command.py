"""`easel keys`, and what the command and the client make of credentials and certificates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.client import ClientTls, EaselClient
from cluster.errors import ConfigError, Unauthenticated
from cluster.security.api_keys import ApiKeys, parse_keys
from cluster.trust import Trust
from tests.certificates import Authority
from tests.unit.commands import invoke


def test_a_new_key_is_printed_once_and_known_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# no line end")
    words = ("--tenant", "acme", "--admin", "--until", "2999-12-31", "--file", str(path), "--json")
    made = json.loads(invoke("keys", "new", *words).stdout)
    assert made["key"] not in path.read_text()
    assert made["line"].endswith(" admin until=2999-12-31")
    identity = ApiKeys(str(path)).identify(made["key"])
    assert (identity.tenant, identity.admin) == ("acme", True)
    plain = invoke("keys", "new", "--tenant", "acme").stdout
    assert plain.startswith("key:  easel_")
    assert "\nline: " in plain
    assert invoke("keys", "new", "--tenant", "a/b").exit_code == 2
    assert invoke("keys", "new", "--tenant", "a", "--file", str(tmp_path)).exit_code == 2


@pytest.mark.parametrize(
    "line",
    [
        "0123456789ab acme",
        "0123456789ab acme sha256:12",
        f"0123456789ab a/b sha256:{'0' * 64}",
        f"0123456789ab acme sha256:{'0' * 64} root",
        f"0123456789ab acme sha256:{'0' * 64} until=soon",
        f"01 acme sha256:{'0' * 64}",
    ],
)
def test_a_file_with_a_line_that_is_none_is_refused_by_its_number_without_showing_it(line: str) -> None:
    with pytest.raises(ConfigError, match=r"line 2 is no line") as refused:
        parse_keys(f"# first\n{line}\n".encode(), "keys")
    assert line not in str(refused.value)


def test_an_id_that_comes_twice_is_refused() -> None:
    line = f"0123456789ab acme sha256:{'0' * 64}\n"
    with pytest.raises(ConfigError, match="line 2 repeats an id"):
        parse_keys((line + line).encode(), "keys")


def test_a_client_refuses_what_no_call_could_use(tmp_path: Path) -> None:
    own = Authority().issue("client").write(tmp_path)
    for trust, what in (
        ({"api_key": "two words"}, "the API key is empty"),
        ({"api_key": ""}, "the API key is empty"),
        ({"tls": ClientTls(ca_file=str(tmp_path / "nowhere"))}, "tls.ca_file: .*nowhere cannot be read"),
        ({"tls": ClientTls(cert_file=own["cert_file"])}, "one is set without the other"),
    ):
        with pytest.raises(ConfigError, match=what):
            EaselClient("localhost:1", **trust)
    assert "secret" not in repr(Trust(api_key="secret"))


def test_an_unknown_form_of_key_is_no_different_from_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("")
    for key in ("", "easel_", "easel_0123456789ab_short", "x" * 10_000, "easel_0123456789ab_" + "A" * 43):
        with pytest.raises(Unauthenticated, match=r"^the API key is not known$"):
            ApiKeys(str(path)).identify(key)
