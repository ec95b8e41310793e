"""How the command ends when something goes wrong: what it prints, and its exit code."""

from __future__ import annotations

import re
from typing import Any

import click

from cluster.errors import (
    ConfigError,
    DeadlineExceeded,
    EaselError,
    EngineCannot,
    EngineError,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    PermissionDenied,
    QueueFull,
    QuotaExceeded,
    RequestIdReused,
    Unauthenticated,
    Unavailable,
)

EXIT_OTHER = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_JOB = 4
EXIT_INTERRUPTED = 130

_EXIT_CODES: tuple[tuple[type[EaselError], int], ...] = (
    (InvalidRequest, EXIT_INVALID),
    (ConfigError, EXIT_INVALID),
    (RequestIdReused, EXIT_INVALID),
    (Unauthenticated, EXIT_INVALID),
    (PermissionDenied, EXIT_INVALID),
    (EngineCannot, EXIT_INVALID),
    (Unavailable, EXIT_UNAVAILABLE),
    (QueueFull, EXIT_UNAVAILABLE),
    (QuotaExceeded, EXIT_UNAVAILABLE),
    (DeadlineExceeded, EXIT_JOB),
    (JobCancelled, EXIT_JOB),
    (JobFailed, EXIT_JOB),
    (EngineError, EXIT_JOB),
)
# Fields of a request that the command fills from something with another name.
_SPOKEN = {"text": "prompt", "timeout": "--timeout-s", "job_id": "job id", "replica": "replica", "request": "request"}
# The command sends images as the first parts of its only message, and a prompt beside them as the last.
_IMAGE = re.compile(r"messages\[0\]\.parts\[(\d+)\]\.image")


class ReportingGroup(click.Group):
    """A command group that turns an EaselError into lines on stderr, and Ctrl-C into a quiet end."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        """Run the chosen command; exits with the code of the error it raised."""
        try:
            return super().invoke(ctx)
        except EaselError as error:
            for line in error_lines(error):
                click.echo(f"easel: error: {line}", err=True)
            hint = hint_for(error)
            if hint:
                click.echo(f"easel: {hint}", err=True)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)


def exit_code(error: EaselError) -> int:
    """The code for an error, as the help text of `easel` tells them."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_OTHER)


def error_lines(error: EaselError) -> list[str]:
    """One line per problem. Fields are named as on the command line where they have an option there."""
    if isinstance(error, InvalidRequest):
        return [f"{spoken_field(v.field)}: {v.description}" for v in error.violations]
    return str(error).splitlines() or [error.reason]


def spoken_field(field: str) -> str:
    """`--t-min` for sampling.t_min, `prompt` for text, `--image[0]` for the first image."""
    image = _IMAGE.match(field.removeprefix("request."))
    if image:
        return f"--image[{image[1]}]"
    name, bracket, index = field.removeprefix("request.").removeprefix("sampling.").partition("[")
    spoken = _SPOKEN.get(name, f"--{name.replace('_', '-')}")
    return spoken + bracket + index


def hint_for(error: EaselError) -> str | None:
    """What to do about an error, where that is not plain from the error itself."""
    if isinstance(error, Unavailable) and str(error).startswith("no cluster answers"):
        return "start one with `easel up`, or name another with --address host:port"
    if isinstance(error, Unauthenticated):
        return "set EASEL_API_KEY, or EASEL_API_KEY_FILE to a file that holds the key"
    if isinstance(error, Unavailable) and str(error).startswith("no trusted cluster answers"):
        return "see --ca-file, --cert-file and --server-name of `easel --help`"
    if isinstance(error, QueueFull):
        return "the queue is full: try again later, or look at `easel status`"
    return None
