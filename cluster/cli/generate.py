"""`easel generate`: one prompt, one answer."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import click

from cluster.cli.connection import address_option, json_option, with_client
from cluster.cli.live import make_console, on_terminal, show_live
from cluster.cli.output import answer_json, print_json
from cluster.cli.request_options import image_option, prompt_of, request_options, to_request_options
from cluster.client import EaselClient
from cluster.errors import EaselError
from cluster.rpc.prompts import Prompt, RequestOptions

CANCEL_S = 2.0


@click.command()
@click.argument("prompt")
@image_option
@request_options
@click.option("--no-drafts", is_flag=True, help="Show canvases only when they are final.")
@json_option
@address_option
def generate(
    prompt: str,
    images: tuple[Path, ...],
    no_drafts: bool,
    as_json: bool,
    address: str | None,
    **values: Any,  # noqa: ANN401
) -> None:
    """Denoise an answer to PROMPT ("-" reads it from standard input).

    In a terminal the canvas is shown while it is denoised: what is final is solid, the draft is dim. Into a
    pipe or a file only the text is written. Ctrl-C stops the job.
    """
    options = to_request_options(values)
    options["request_id"] = options["request_id"] or f"job-{uuid.uuid4().hex}"
    asked = prompt_of(prompt, images)
    live = on_terminal() and not as_json

    async def body(client: EaselClient) -> None:
        async with _cancelling(client, options["request_id"]):
            if live:
                await _live(client, asked, options, drafts=not no_drafts)
            else:
                await _plain(client, asked, options, as_json=as_json)

    with_client(address, body)


async def _live(client: EaselClient, prompt: Prompt, options: RequestOptions, *, drafts: bool) -> None:
    async with aclosing(client.stream(prompt, drafts=drafts, **options)) as events:
        await show_live(make_console(), events)


async def _plain(client: EaselClient, prompt: Prompt, options: RequestOptions, *, as_json: bool) -> None:
    answer = await client.generate(prompt, **options)
    if as_json:
        print_json(answer_json(answer))
    else:
        click.echo(answer.text)


@asynccontextmanager
async def _cancelling(client: EaselClient, job_id: str) -> AsyncIterator[None]:
    """Cancel the job when the command is interrupted; the wait for that is bounded, and it may be too late."""
    try:
        yield
    except asyncio.CancelledError:
        with contextlib.suppress(EaselError, TimeoutError):
            await asyncio.wait_for(client.cancel(job_id), CANCEL_S)
        raise
