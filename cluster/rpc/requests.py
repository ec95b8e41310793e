"""The check of requests before any compute. What passes here can be run; what does not is refused whole.

Every check adds to one list, so that a caller sees all that is wrong with a request at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from cluster.core import Image, JobSpec, ModelCard, Priority, SamplingParams, Turn, Violation
from cluster.errors import InvalidRequest
from cluster.rpc import convert
from cluster.rpc.chat import bad_messages, characters_of, turns_of
from cluster.rpc.easel.v1 import generation_pb2, jobs_pb2
from cluster.rpc.images import bad_images, bad_places, images_of
from cluster.rpc.sampling import resolve_sampling, room_tokens, shown

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TENANT_CHARS = 128
MAX_TIMEOUT_MS = 24 * 3600 * 1000
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_TOKEN_CHARS = 256
# The longest tokens in use are runs of about 30 spaces; an average of 64 characters a token is out of reach.
MAX_CHARACTERS_PER_TOKEN = 64
# A list can be wrong in a million places; naming a few of them helps, naming all of them does not.
MAX_VIOLATIONS_PER_LIST = 8

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ID_RULE = "allowed are 1 to 128 of letters, digits, '.', '_', ':' and '-'"
_PROMPT_FIELDS = "exactly one of text, messages and token_ids must be set"


class Encoder(Protocol):
    """The part of a checkpoint's tokenizer that a router needs."""

    def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
        """Token ids of a chat of (role, content) pairs with the chat template applied, which puts the model's image
        token where an image is; roles are "system", "user" and "assistant". Raises ValueError with a reason when the
        template refuses the chat.
        """


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that can be run. `digest` is equal for equal bodies: it tells a repeated request id from a
    reused one. `timeout_ms` counts from acceptance; None means no limit. `images` are those of the prompt, in order.
    """

    job_id: str
    digest: str
    spec: JobSpec
    timeout_ms: int | None
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class ListQuery:
    """One page of jobs to list. `state` is the lower-case word of a job state, None for any."""

    page_size: int
    page_token: str
    state: str | None


def parse_generate(
    request: generation_pb2.GenerateRequest,
    card: ModelCard,
    encoder: Encoder,
    *,
    deadline_ms: int | None,
    new_id: Callable[[], str],
    new_seed: Callable[[], int],
) -> ParsedRequest:
    """Check a request against the contract and the model, and fill in what it leaves out.

    `deadline_ms` is what is left of the gRPC deadline; it is the job's timeout when the request names none.
    `new_id` and `new_seed` are asked only where the request has none. Raises InvalidRequest with all
    violations found.
    """
    bad: list[Violation] = []
    images = images_of(request.messages)
    prompt_tokens = _prompt_tokens(request, card, encoder, len(images), bad)
    context_tokens = card.context_tokens(len(prompt_tokens), len(images)) if prompt_tokens else 0
    sampling = resolve_sampling(request.sampling, card, context_tokens, new_seed, bad)
    bad.extend(_envelope(request))
    timeout_ms = _timeout_ms(request, deadline_ms, bad)
    if bad or sampling is None:
        raise InvalidRequest(bad)
    job_id = request.request_id or new_id()
    spec = replace(_spec(request, job_id, prompt_tokens, sampling), image_count=len(images))
    return ParsedRequest(job_id, digest_of(request), spec, timeout_ms, images)


@contextmanager
def under(field: str) -> Iterator[None]:
    """Name the field that holds the request: Jobs.Submit's violations are those of `request.` and so on."""
    try:
        yield
    except InvalidRequest as error:
        nested = [Violation(f"{field}.{v.field}", v.description) for v in error.violations]
        raise InvalidRequest(nested) from None


def _spec(
    request: generation_pb2.GenerateRequest, job_id: str, prompt: Sequence[int], sampling: SamplingParams
) -> JobSpec:
    return JobSpec(
        job_id=job_id,
        prompt_tokens=tuple(prompt),
        sampling=sampling,
        stop=tuple(request.sampling.stop),
        priority=convert.priority_from_proto(request.priority),
        tenant=request.tenant,
        wants_drafts=request.drafts,
    )


def digest_of(request: generation_pb2.GenerateRequest) -> str:
    """SHA-256 of what decides the answer and its place: all but the request id, the timeout and drafts."""
    body = generation_pb2.GenerateRequest()
    body.CopyFrom(request)
    for name in ("request_id", "timeout", "drafts"):
        body.ClearField(name)
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()


def _prompt_tokens(
    request: generation_pb2.GenerateRequest, card: ModelCard, encoder: Encoder, images: int, bad: list[Violation]
) -> list[int]:
    """The context, or an empty list with the reason in `bad`."""
    name, problems, encode = _prompt(request, card, encoder)
    if problems:
        bad.extend(problems)
        return []
    try:
        tokens = encode()
    except ValueError as error:
        bad.append(Violation(name, f"the model's chat template refuses it: {error}"))
        return []
    bad_size = [*bad_places(name, tokens, images, card), *_bad_size(name, len(tokens), images, card)]
    bad.extend(bad_size)
    return [] if bad_size else tokens


def _prompt(
    request: generation_pb2.GenerateRequest, card: ModelCard, encoder: Encoder
) -> tuple[str, list[Violation], Callable[[], list[int]]]:
    """(field, what is wrong with it, how to encode it) of the prompt in the form that it has."""
    given = [name for name in ("text", "messages", "token_ids") if _is_given(request, name)]
    if len(given) != 1:
        what = f"is set as well as {given[0]}" if given else "is not set, nor are messages and token_ids"
        wrong = Violation(given[1] if given else "text", f"{what}; {_PROMPT_FIELDS}")
        return wrong.field, [wrong], list
    name = given[0]
    if name == "text":
        problems = [*_bad_text(request.text), *_bad_length(name, len(request.text), card)]
        return name, problems, lambda: encoder.encode_messages([("user", request.text)])
    if name == "messages":
        problems = [*_some(bad_messages(request.messages), name)]
        problems += [*bad_images(request.messages), *_bad_length(name, characters_of(request.messages), card)]
        return name, problems, lambda: encoder.encode_messages(turns_of(request.messages))
    return name, _some(_bad_tokens(request.token_ids, card), name), lambda: list(request.token_ids)


def _is_given(request: generation_pb2.GenerateRequest, name: str) -> bool:
    return request.HasField("text") if name == "text" else bool(getattr(request, name))


def _bad_text(text: str) -> Iterator[Violation]:
    if not text.strip():
        yield Violation("text", f"is {shown(text)}; a prompt must hold something besides white space")


def _bad_length(name: str, characters: int, card: ModelCard) -> Iterator[Violation]:
    """Text that no tokenizer can fit into the context is refused before a tokenizer spends seconds on it."""
    most = MAX_CHARACTERS_PER_TOKEN * card.max_context_tokens
    if characters > most:
        what = f"is {characters} characters long; at most {most} can fit a context of {card.max_context_tokens} tokens"
        yield Violation(name, what)


def _bad_tokens(token_ids: Sequence[int], card: ModelCard) -> Iterator[Violation]:
    for index, token in enumerate(token_ids):
        if not 0 <= token < card.vocab_size:
            what = f"is {token}; the model's vocabulary is 0 to {card.vocab_size - 1}"
            yield Violation(f"token_ids[{index}]", what)


def _some(violations: Iterator[Violation], name: str) -> list[Violation]:
    first = list(islice(violations, MAX_VIOLATIONS_PER_LIST))
    more = sum(1 for _ in violations)
    return [*first, Violation(name, f"{more} more values are wrong")] if more else first


def _bad_size(name: str, encoded_tokens: int, images: int, card: ModelCard) -> list[Violation]:
    if encoded_tokens == 0:
        return [Violation(name, "encodes to no tokens; a prompt needs at least one")]
    prompt_tokens = card.context_tokens(encoded_tokens, images)
    if room_tokens(card, prompt_tokens) >= card.canvas_tokens:
        return []
    most = card.max_context_tokens - card.canvas_tokens
    with_images = f" with its {images} images" if images else ""
    what = (
        f"is {prompt_tokens} tokens long{with_images}; at most {most} fit, for the context holds "
        f"{card.max_context_tokens} and one canvas of {card.canvas_tokens} must have room"
    )
    return [Violation(name, what)]


def _envelope(request: generation_pb2.GenerateRequest) -> Iterator[Violation]:
    if request.request_id:
        yield from _bad_id("request_id", request.request_id)
    if request.priority not in generation_pb2.Priority.values():
        names = ", ".join(f"{p.name} ({p.value})" for p in Priority)
        yield Violation("priority", f"is {request.priority}; allowed are {names} and none")
    if len(request.tenant) > MAX_TENANT_CHARS:
        what = f"is {len(request.tenant)} characters long; allowed are at most {MAX_TENANT_CHARS}"
        yield Violation("tenant", what)
    yield from _bad_stops(request.sampling.stop)


def _bad_stops(stops: Sequence[str]) -> Iterator[Violation]:
    if len(stops) > MAX_STOPS:
        yield Violation("sampling.stop", f"has {len(stops)} strings; allowed are at most {MAX_STOPS}")
    for index, stop in enumerate(stops[:MAX_STOPS]):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            what = f"is {len(stop)} characters long; allowed are 1 to {MAX_STOP_CHARS}"
            yield Violation(f"sampling.stop[{index}]", what)


def _bad_id(field: str, value: str) -> Iterator[Violation]:
    if not _ID.fullmatch(value):
        yield Violation(field, f"is {shown(value)}, {len(value)} characters; {_ID_RULE}")


def _timeout_ms(request: generation_pb2.GenerateRequest, deadline_ms: int | None, bad: list[Violation]) -> int | None:
    if not request.HasField("timeout"):
        return None if deadline_ms is None else min(max(deadline_ms, 1), MAX_TIMEOUT_MS)
    seconds, nanos = request.timeout.seconds, request.timeout.nanos
    # The parts of a valid Duration have the same sign, so a positive one has neither below zero.
    valid = seconds >= 0 and 0 <= nanos < 10**9
    timeout_ms = seconds * 1000 - (-nanos // 10**6)
    if not valid or not 0 < timeout_ms <= MAX_TIMEOUT_MS:
        given = f"{seconds} s" + (f" and {nanos} ns" if nanos else "")
        bad.append(Violation("timeout", f"is {given}; allowed is above 0 up to {MAX_TIMEOUT_MS // 1000} s"))
    return timeout_ms


def check_job_id(job_id: str) -> str:
    """A job's id as it is. Raises InvalidRequest when no job can have it."""
    return _checked(job_id, _bad_id("job_id", job_id))


def check_from_canvas(from_canvas: int) -> int:
    """The offset of a watch as it is. Raises InvalidRequest below 0."""
    if from_canvas < 0:
        raise InvalidRequest([Violation("from_canvas", f"is {from_canvas}; allowed is 0 and above")])
    return from_canvas


def check_within_job(from_canvas: int, canvases: int, *, ended: bool) -> int:
    """The offset of a watch as it is. Raises InvalidRequest when the job has, or can get, fewer canvases than that.

    An offset of all `canvases` is allowed: whoever has them all waits for the end.
    """
    if from_canvas > canvases:
        why = f"the job has ended with {canvases} canvases" if ended else f"the job writes at most {canvases} canvases"
        raise InvalidRequest([Violation("from_canvas", f"is {from_canvas}; allowed is 0 to {canvases}: {why}")])
    return from_canvas


def parse_list(request: jobs_pb2.ListJobsRequest) -> ListQuery:
    """Check a page request. Raises InvalidRequest; the store checks whose page token it is."""
    bad: list[Violation] = []
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        what = f"is {request.page_size}; allowed are 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}"
        bad.append(Violation("page_size", what))
    if len(request.page_token) > MAX_PAGE_TOKEN_CHARS:
        what = f"is {len(request.page_token)} characters long; send next_page_token of the page before"
        bad.append(Violation("page_token", what))
    if request.state not in jobs_pb2.JobState.values():
        names = ", ".join(jobs_pb2.JobState.keys()[1:])
        bad.append(Violation("state", f"is {request.state}; allowed are {names} and none"))
    if bad:
        raise InvalidRequest(bad)
    state = convert.job_state_from_proto(request.state)
    return ListQuery(request.page_size or DEFAULT_PAGE_SIZE, request.page_token, state)


def _checked(value: str, violations: Iterator[Violation]) -> str:
    found = list(violations)
    if found:
        raise InvalidRequest(found)
    return value
