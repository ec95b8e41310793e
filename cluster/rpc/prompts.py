"""Builds a GenerateRequest from Python values: what a client accepts as a prompt and as options."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration

from cluster.core import Priority, Violation
from cluster.errors import InvalidRequest
from cluster.rpc import convert
from cluster.rpc.easel.v1 import generation_pb2
from cluster.rpc.sampling import shown

# A text, an image's data, or the path of an image's file.
Part = str | bytes | PathLike[str]
Said = str | Sequence[Part]
Message = Mapping[str, Any] | tuple[str, Said]
Prompt = str | Sequence[Message]

# No router takes more than this in one request: such a file need not be read.
MAX_FILE_BYTES = 64 * 2**20

_SAMPLING = (
    "seed",
    "max_new_tokens",
    "max_denoising_steps",
    "entropy_bound",
    "t_min",
    "t_max",
    "confidence_threshold",
    "stability_threshold",
)
_NAMES = frozenset((*_SAMPLING, "stop", "request_id", "priority", "tenant", "timeout_s"))
_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}


class RequestOptions(TypedDict, total=False):
    """Everything about a request besides its prompt; what is left out, or None, takes the model's default.

    The fields are those of easel.v1.GenerateRequest and SamplingParams. `timeout_s` bounds the job from
    acceptance to the whole answer.
    """

    seed: int | None
    max_new_tokens: int | None
    max_denoising_steps: int | None
    entropy_bound: float | None
    t_min: float | None
    t_max: float | None
    confidence_threshold: float | None
    stability_threshold: int | None
    stop: Sequence[str]
    request_id: str
    priority: Priority
    tenant: str
    timeout_s: float | None


def build_request(
    prompt: Prompt | None, tokens: Sequence[int] | None, options: RequestOptions, *, drafts: bool = False
) -> generation_pb2.GenerateRequest:
    """A request with an id, so that repeating it joins the same job instead of starting another.

    A message is (role, content) or a mapping with these keys. Its content is a text, or a list of texts (str), images
    (bytes) and files of images (paths, read here) in the order in which they are to be read.

    Raises InvalidRequest for what the wire format cannot carry (a number out of its type's range, text that
    is not Unicode, an unknown role) and for a file that cannot be read, TypeError for an unknown option or a
    value of the wrong type. All other limits are the router's to check.
    """
    unknown = set(options) - _NAMES
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; known are {', '.join(sorted(_NAMES))}")
    request = generation_pb2.GenerateRequest(drafts=drafts)
    _set_prompt(request, prompt, tokens)
    _set_sampling(request.sampling, options)
    _put("request_id", options.get("request_id") or f"job-{uuid.uuid4().hex}", request)
    _put("tenant", options.get("tenant", ""), request)
    request.priority = convert.priority_to_proto(options.get("priority", Priority.NORMAL))
    timeout_s = options.get("timeout_s")
    if timeout_s is not None:
        request.timeout.CopyFrom(_duration(timeout_s))
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt | None, tokens: Sequence[int] | None) -> None:
    if isinstance(prompt, str):
        _put("text", prompt, request)
    elif prompt is not None:
        for index, message in enumerate(prompt):
            _add_message(request, index, message)
    if tokens is not None:
        _carried("token_ids", tokens, lambda: request.token_ids.extend(tokens))


def _add_message(request: generation_pb2.GenerateRequest, index: int, message: Message) -> None:
    role, content = message if isinstance(message, tuple) else (message["role"], message["content"])
    if role not in _ROLES:
        what = f"is {shown(role)}; allowed are {', '.join(_ROLES)}"
        raise InvalidRequest([Violation(f"messages[{index}].role", what)])
    turn = request.messages.add(role=_ROLES[role])
    if isinstance(content, str):
        _put("content", content, turn, prefix=f"messages[{index}].")
        return
    for place, part in enumerate(content):
        _add_part(turn, f"messages[{index}].parts[{place}].", part)


def _add_part(turn: generation_pb2.ChatMessage, at: str, part: Part) -> None:
    if isinstance(part, str):
        _put("text", part, turn.parts.add(), prefix=at)
    elif isinstance(part, bytes):
        turn.parts.add().image.data = part
    elif isinstance(part, PathLike):
        turn.parts.add().image.data = _read(f"{at}image", Path(part))
    else:
        raise TypeError(f"{at[:-1]} is {type(part).__name__}; allowed are str, bytes and paths")


def _read(field: str, path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes <= MAX_FILE_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InvalidRequest([Violation(field, f"is {str(path)!r}; {error.strerror or error}")]) from None
    what = f"is {str(path)!r} of {size_bytes} bytes; at most {MAX_FILE_BYTES} can be sent"
    raise InvalidRequest([Violation(field, what)])


def _set_sampling(sampling: generation_pb2.SamplingParams, options: RequestOptions) -> None:
    values: Mapping[str, object] = options
    for name in _SAMPLING:
        if values.get(name) is not None:
            _put(name, values[name], sampling, prefix="sampling.")
    stops = options.get("stop", ())
    _carried("sampling.stop", stops, lambda: sampling.stop.extend(stops))


def _put(name: str, value: object, message: object, *, prefix: str = "") -> None:
    _carried(f"{prefix}{name}", value, lambda: setattr(message, name, value))


def _carried(field: str, value: object, put: Callable[[], None]) -> None:
    # protobuf raises ValueError for what a field's type cannot hold, and a UnicodeError, which is one, for
    # bad text.
    try:
        put()
    except ValueError as error:
        reason = "text must be valid Unicode" if isinstance(error, UnicodeError) else "out of the field's range"
        raise InvalidRequest([Violation(field, f"is {shown(value)}; {reason}")]) from None


def _duration(timeout_s: float) -> Duration:
    duration = Duration()
    try:
        duration.FromNanoseconds(round(timeout_s * 1e9))
    except (ValueError, OverflowError):
        raise InvalidRequest([Violation("timeout", f"is {timeout_s} s; allowed is above 0 up to 86400 s")]) from None
    return duration
