"""Request bytes to messages, with a field violation where protobuf says no more than "cannot parse".

protobuf refuses a message with a bad string but does not say which field it was. Python's own gRPC server
reports any such failure as UNKNOWN. Both are put right here: parsing is left to protobuf, and only bytes that
it refused are walked once more, along the message's descriptor, to name the field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from cluster.core import Violation
from cluster.errors import InvalidRequest

AnyMessage = TypeVar("AnyMessage", bound=Message)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def parse(message_type: type[AnyMessage], data: bytes) -> AnyMessage:
    """The message in `data`. Raises InvalidRequest, which names each string field that is not UTF-8."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(_diagnose(cast(Descriptor, message_type.DESCRIPTOR), data, str(error))) from None


def _diagnose(descriptor: Descriptor, data: bytes, reason: str) -> list[Violation]:
    found = list(bad_strings(descriptor, data))
    if found:
        return found
    cause = reason.rsplit(": ", 1)[-1]
    return [Violation("request", f"cannot be parsed as {descriptor.full_name}: {cause}")]


def bad_strings(descriptor: Descriptor, data: bytes, prefix: str = "") -> Iterator[Violation]:
    """Every string field of an encoded message that is not UTF-8; ends where the encoding itself breaks."""
    seen: Counter[str] = Counter()
    for number, value in _length_delimited(data):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        path = f"{prefix}{field.name}" + (f"[{seen[field.name]}]" if field.is_repeated else "")
        seen[field.name] += 1
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            yield from bad_strings(field.message_type, value, f"{path}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield from _bad_utf8(path, value)


def _bad_utf8(path: str, value: bytes) -> Iterator[Violation]:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte {value[error.start]:#04x} at offset {error.start}; text must be valid UTF-8"
        yield Violation(path, what)


def _length_delimited(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, payload) of all length-delimited fields, by the rules of the wire format."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _BYTES:
            size, position = _varint(data, position)
            yield tag >> 3, data[position : position + size]
            position += size
        else:
            return


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, next position) of a base-128 varint; the position is the end when it is cut off or over 64
    bits.
    """
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    return value, len(data)
