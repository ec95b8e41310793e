"""The messages of a request: what may be said in them, and how they become turns for a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cluster.core import Content, Image, Turn, Violation
from cluster.rpc.easel.v1 import generation_pb2
from cluster.rpc.sampling import shown

Messages = Sequence[generation_pb2.ChatMessage]
Part = generation_pb2.ContentPart

_ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}
_EMPTY = "must hold something besides white space"


def turns_of(messages: Iterable[generation_pb2.ChatMessage]) -> list[Turn]:
    """(role, content) pairs of messages that `bad_messages` finds nothing wrong with."""
    return [(_ROLES[message.role], _content(message)) for message in messages]


def image_parts(messages: Messages) -> Iterator[tuple[str, Part]]:
    """(field, part) of every part that holds an image."""
    for index, message in enumerate(messages):
        for place, part in enumerate(message.parts):
            if part.HasField("image"):
                yield f"messages[{index}].parts[{place}].image", part


def characters_of(messages: Iterable[generation_pb2.ChatMessage]) -> int:
    """How much text there is."""
    return sum(len(message.content) + sum(len(part.text) for part in message.parts) for message in messages)


def bad_messages(messages: Messages) -> Iterator[Violation]:
    """What is wrong with the messages, but for the images themselves."""
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if message.role not in _ROLES:
            what = f"is {_role_name(message.role)}; allowed are ROLE_SYSTEM, ROLE_USER and ROLE_ASSISTANT"
            yield Violation(f"{at}.role", what)
        yield from _bad_parts(at, message) if message.parts else _bad_content(at, message.content)


def _bad_content(at: str, content: str) -> Iterator[Violation]:
    if not content.strip():
        yield Violation(f"{at}.content", f"is {shown(content)}; a message {_EMPTY}")


def _bad_parts(at: str, message: generation_pb2.ChatMessage) -> Iterator[Violation]:
    if message.content:
        yield Violation(f"{at}.parts", "is set as well as content; exactly one of them must be set")
    for place, part in enumerate(message.parts):
        if part.WhichOneof("part") is None:
            yield Violation(f"{at}.parts[{place}]", "is empty; exactly one of text and image must be set")
        if part.HasField("image") and message.role != generation_pb2.ROLE_USER:
            what = f"is in a message of {_role_name(message.role)}; images are for ROLE_USER"
            yield Violation(f"{at}.parts[{place}].image", what)
    if not any(part.HasField("image") or part.text.strip() for part in message.parts):
        yield Violation(f"{at}.parts", f"holds no image and no text; a message {_EMPTY}")


def _content(message: generation_pb2.ChatMessage) -> Content:
    if not any(part.HasField("image") for part in message.parts):
        return message.content + "".join(part.text for part in message.parts)
    return tuple(_image(part) if part.HasField("image") else part.text for part in message.parts)


def _image(part: Part) -> Image:
    return Image(part.image.data, part.image.mime_type)


def _role_name(value: generation_pb2.Role.ValueType) -> str:
    return generation_pb2.Role.Name(value) if value in generation_pb2.Role.values() else str(value)
