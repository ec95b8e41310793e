"""Log lines, as text or as one JSON object each, with the process and the job that they are about."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# The job that a task works for, and its epoch where it has one. Each task has its own context.
current_job: ContextVar[tuple[str, int | None] | None] = ContextVar("current_job", default=None)


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, process; job_id and epoch where known; the traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
        }
        job = current_job.get()
        if job is not None:
            job_id, epoch = job
            line |= {"job_id": job_id} if epoch is None else {"job_id": job_id, "epoch": epoch}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_lines(level: str, form: Literal["text", "json"], process: str) -> None:
    """Log to standard error, unless this process logs somewhere already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level, handlers=[handler])
