"""Names in Redis."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from cluster.errors import ConfigError, InvalidRequest
from cluster.jobs.keys import Keys
from cluster.jobs.paging import cursor_of, token_of


def test_every_name_carries_the_hash_tag_of_its_namespace() -> None:
    keys = Keys("easel")
    of_a_job = [keys.job("j"), keys.canvases("j"), keys.checkpoint("j"), keys.images("j")]
    names = [*keys.fixed, *of_a_job, keys.replica("r"), keys.running("r"), keys.schema]
    assert all(name.startswith("{easel}") for name in names)
    assert len(set(names)) == len(names)


def test_the_fixed_names_come_in_the_order_in_which_the_scripts_read_them() -> None:
    text = files("cluster.jobs").joinpath("lua/lib/names.lua").read_text()
    read = re.findall(r"^local ([A-Z, ]+) = KEYS\[", text, re.MULTILINE)
    names = [name.strip().lower() for line in read for name in line.split(",")]
    assert names == ["base", *(key.removeprefix("{easel}:") for key in Keys("easel").fixed[1:])]


def test_no_id_spells_the_name_of_another_kind() -> None:
    keys = Keys("easel")
    assert keys.job("x:canvases") != keys.canvases("x")
    assert keys.job("x:checkpoint") != keys.checkpoint("x")
    assert keys.process_bell("job:x") != keys.job_bell("x")


@pytest.mark.parametrize("job_id", ["", "a b", "a\nb", "x" * 201, "jobé"])
def test_a_job_id_that_cannot_be_stored_is_refused_by_field(job_id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Keys("easel").job(job_id)
    assert [violation.field for violation in caught.value.violations] == ["job_id"]


@pytest.mark.parametrize("namespace", ["", "a b", "{a}", "x" * 65])
def test_a_namespace_that_is_no_hash_tag_is_a_config_error(namespace: str) -> None:
    with pytest.raises(ConfigError, match="redis namespace is"):
        Keys(namespace)


def test_a_page_token_says_where_the_page_ended() -> None:
    assert cursor_of(token_of("42")) == "(42"
    assert cursor_of(token_of("")) == "+inf"


@pytest.mark.parametrize("token", ["x", "42", "é", token_of("9" * 17), token_of("-1"), token_of("1)")])
def test_a_foreign_page_token_is_refused_by_field(token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        cursor_of(token)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]
