"""What the command prints for programs: JSON with snake_case keys and lower-case words."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

import click

from cluster.client import Answer, JobView


def print_json(value: object) -> None:
    """Print one JSON value on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer, without its token ids."""
    return {
        "job_id": answer.job_id,
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "usage": asdict(answer.usage),
        "model": answer.model,
        "replica": answer.replica,
        "seed": answer.seed,
    }


def job_json(job: JobView) -> dict[str, Any]:
    """A job, with its priority as a word."""
    values = asdict(job)
    values["priority"] = job.priority.name.lower()
    values["finish_reason"] = job.finish_reason.value if job.finish_reason else None
    values["error"] = values.pop("problem")
    return values
