"""What an image in a request may be. Files are looked at, not decoded: pixels are the engine's work.

Pillow reads the headers, for engines decode with it: the size that is checked here is the size that they will find.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL.Image import DecompressionBombError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cluster.core import Image, ModelCard, Violation
from cluster.rpc.chat import Messages, image_parts
from cluster.rpc.easel.v1 import generation_pb2
from cluster.rpc.sampling import shown

MAX_IMAGES = 16
MAX_IMAGE_BYTES = 4 * 2**20
MAX_TOTAL_BYTES = 16 * 2**20
MAX_SIDE_PX = 8192
# Decoded it takes 3 bytes a pixel.
MAX_PIXELS = 2**25

_READERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
}
MIME_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# The first bytes of a file, and which of them tell what it is.
_MAGIC = (("PNG", b"\x89PNG\r\n\x1a\n", 0), ("JPEG", b"\xff\xd8\xff", 0), ("WEBP", b"WEBP", 8))
# What Pillow raises for a file that is not whole, or that says that it has far too many pixels.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)
_DAMAGED = (*_BROKEN, DecompressionBombError)
_JPEG_END = b"\xff\xd9"
_ALLOWED = f"allowed are {', '.join(MIME_TYPES.values())}"


@dataclass(frozen=True, slots=True)
class _Header:
    width_px: int
    height_px: int
    frames: int


def images_of(messages: Messages) -> tuple[Image, ...]:
    """All images of a chat, in the order in which they are read; their mime types are those of the data."""
    return tuple(
        Image(part.image.data, MIME_TYPES.get(_kind_of(part.image.data) or "", "")) for _, part in image_parts(messages)
    )


def bad_images(messages: Messages) -> Iterator[Violation]:
    """What is wrong with the images of a chat. Where there are too many, none is looked at."""
    images = [(field, part.image) for field, part in image_parts(messages)]
    if len(images) > MAX_IMAGES:
        yield Violation("messages", f"hold {len(images)} images; at most {MAX_IMAGES} are allowed")
        return
    total_bytes = sum(len(image.data) for _, image in images)
    if total_bytes > MAX_TOTAL_BYTES:
        what = f"hold images of {total_bytes} bytes in all; at most {MAX_TOTAL_BYTES} are allowed"
        yield Violation("messages", what)
        return
    for field, image in images:
        yield from _bad_image(field, image)


def bad_places(field: str, tokens: Sequence[int], images: int, card: ModelCard) -> Iterator[Violation]:
    """A prompt with images must have as many places for them: a text can spell an image token, a template drop one."""
    if not images or card.vision is None:
        return
    places = tokens.count(card.vision.image_token_id)
    if places != images:
        what = f"hold {images} images, but the model's chat template makes {places} image tokens of them"
        yield Violation(field, f"{what}; texts must not hold the image token, and the template must know images")


def _bad_image(field: str, image: generation_pb2.Image) -> Iterator[Violation]:
    size_bytes = len(image.data)
    if not 1 <= size_bytes <= MAX_IMAGE_BYTES:
        yield Violation(f"{field}.data", f"is {size_bytes} bytes; allowed are 1 to {MAX_IMAGE_BYTES}")
        return
    kind = _kind_of(image.data)
    if kind is None:
        yield Violation(f"{field}.data", f"begins with {shown(image.data[:8])}, which no known kind does; {_ALLOWED}")
        return
    if image.mime_type not in ("", MIME_TYPES[kind]):
        what = f"is {shown(image.mime_type)}, but the data is {MIME_TYPES[kind]}; name that, or nothing"
        yield Violation(f"{field}.mime_type", what)
    try:
        header = _read_header(kind, image.data)
    except ValueError as error:
        yield Violation(f"{field}.data", f"is a damaged {MIME_TYPES[kind]}: {error}")
    else:
        yield from _bad_header(f"{field}.data", header)


def _bad_header(field: str, header: _Header) -> Iterator[Violation]:
    width_px, height_px = header.width_px, header.height_px
    if not (1 <= width_px <= MAX_SIDE_PX and 1 <= height_px <= MAX_SIDE_PX and width_px * height_px <= MAX_PIXELS):
        allowed = f"allowed are sides of 1 to {MAX_SIDE_PX} and {MAX_PIXELS} in all"
        yield Violation(field, f"is {width_px} x {height_px} pixels; {allowed}")
    if header.frames > 1:
        yield Violation(field, f"has {header.frames} frames; only still images are allowed")


def _kind_of(data: bytes) -> str | None:
    for kind, magic, offset in _MAGIC:
        if data[offset : offset + len(magic)] == magic and (offset == 0 or data.startswith(b"RIFF")):
            return kind
    return None


def _read_header(kind: str, data: bytes) -> _Header:
    """Raises ValueError with what is wrong for a file that is cut off or not whole in another way, as far as its
    structure tells; only decoding tells all.
    """
    if kind == "JPEG" and _JPEG_END not in data:
        raise ValueError("its end is missing")
    try:
        with _READERS[kind](io.BytesIO(data)) as image:
            # A photo may bring a preview or a second view along; decoders take the first picture of a JPEG.
            frames = 1 if kind == "JPEG" else int(getattr(image, "n_frames", 1))
            header = _Header(image.width, image.height, frames)
            image.verify()
    except _DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return header
