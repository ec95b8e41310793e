"""The options that make a request, shared by `generate` and `submit`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from cluster.core import Priority
from cluster.rpc.prompts import Prompt, RequestOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--seed", type=int, help="Seed of the job; the same seed gives the same answer."),
    click.option("--max-new-tokens", type=int, help="Most tokens to write."),
    click.option("--max-denoising-steps", type=int, help="Most denoising steps per canvas, 1 to 1000."),
    click.option("--entropy-bound", type=float, help="Nats accepted in one step; higher is faster, less careful."),
    click.option("--t-min", type=float, help="Temperature at the last step."),
    click.option("--t-max", type=float, help="Temperature at the first step."),
    click.option("--confidence-threshold", type=float, help="Mean entropy, in nats, below which a canvas may end."),
    click.option("--stability-threshold", type=int, help="Steps without a change after which a canvas may end."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; may be repeated."),
    click.option(
        "--priority",
        type=click.Choice([priority.name.lower() for priority in Priority]),
        default="normal",
        show_default=True,
        help="Place in the queue.",
    ),
    click.option("--tenant", default="", help="Whom the job is for."),
    click.option("--timeout-s", type=float, help="Seconds from acceptance to the whole answer."),
    click.option("--request-id", default="", help="Id of the job; the same id and request joins the same job."),
)


def request_options(command: Command) -> Command:
    """Adds all options of a request; the command gets them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


image_option = click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A PNG, JPEG or WebP that comes before the prompt; may be repeated.",
)


def to_request_options(values: Mapping[str, Any]) -> RequestOptions:
    """The keywords of a command as options of the client."""
    return cast(RequestOptions, {**values, "priority": Priority[values["priority"].upper()]})


def prompt_of(argument: str, images: Sequence[Path]) -> Prompt:
    """What the command line asks for: a text, or a message of images and the text."""
    text = read_prompt(argument)
    return [("user", [*images, text])] if images else text


def read_prompt(argument: str) -> str:
    """The prompt: the argument, or standard input for "-", without its last line breaks.

    Bytes of standard input that are not UTF-8 are kept as lone surrogates, which the request's check refuses
    by name.
    """
    if argument != "-":
        return argument
    return sys.stdin.buffer.read().decode(errors="surrogateescape").rstrip("\r\n")
