"""Small images for tests, of every kind that is allowed."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image as Pillow

from cluster.rpc.easel.v1 import generation_pb2 as v1


def picture(kind: str = "PNG", width_px: int = 8, height_px: int = 6, **options: Any) -> bytes:  # noqa: ANN401 - Pillow's
    """A whole file of one colour."""
    file = io.BytesIO()
    Pillow.new("RGB", (width_px, height_px), (200, 30, 60)).save(file, kind, **options)
    return file.getvalue()


def damaged() -> bytes:
    """A PNG whose structure is whole and whose pixels are not: only decoding tells."""
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 8, 2, 0, 0, 0))
    return head + _chunk(b"IDAT", b"\x78\x9cnothing that inflates") + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def animation(kind: str) -> bytes:
    """Two frames."""
    file = io.BytesIO()
    frames = [Pillow.new("RGB", (8, 6), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def asked(*parts: str | bytes, role: v1.Role.ValueType = v1.ROLE_USER) -> v1.GenerateRequest:
    """A request of one message with these parts."""
    message = v1.ChatMessage(role=role)
    for part in parts:
        if isinstance(part, str):
            message.parts.add(text=part)
        else:
            message.parts.add().image.data = part
    return v1.GenerateRequest(messages=[message])
