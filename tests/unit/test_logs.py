"""Log lines for machines."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from cluster.config import parse_settings
from cluster.errors import ConfigError
from cluster.telemetry.logs import JsonLines, current_job


def said(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, Any]:
    told = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("deployments.charge", logging.WARNING, __file__, 1, message, arguments, told)
    line = JsonLines("router-0").format(record)
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_a_line_is_one_object_with_its_process() -> None:
    line = said("lost: %s", "a\nb")
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "deployments.charge",
        "message": "lost: a\nb",
        "process": "router-0",
    }


async def test_each_task_says_the_job_that_it_works_for() -> None:
    async def work(job_id: str, epoch: int | None) -> dict[str, Any]:
        current_job.set((job_id, epoch))
        await asyncio.sleep(0)
        return said("hello")

    first, second = await asyncio.gather(work("a", 2), work("b", None))
    assert (first["job_id"], first["epoch"]) == ("a", 2)
    assert second["job_id"] == "b"
    assert "epoch" not in second
    assert "job_id" not in said("hello")


def test_a_traceback_stays_on_the_line() -> None:
    with pytest.raises(ValueError, match="broken") as broken:
        int("broken")
    assert "ValueError: invalid literal" in said("it failed", error=broken.value)["traceback"]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="log_format"):
        parse_settings({"checkpoint": "x", "log_format": "xml"})
