"""Images of a job as pixels. Files come with their headers checked; what only decoding tells is told here, before any
compute."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from PIL.ImageOps import exif_transpose

from cluster.core import Image

FORMATS = ("PNG", "JPEG", "WEBP")
# Decoded they take 3 bytes a pixel, on the replica's host, until the engine has scaled them down.
MAX_JOB_PIXELS = 2**26
# What Pillow raises for files that are not whole, or not what they say.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)
_DAMAGED = (*_BROKEN, Pillow.DecompressionBombError, UnidentifiedImageError)


@dataclass(frozen=True, slots=True)
class DecodedImage(Image):
    """An image with its pixels, as Pillow has them: RGB, 8 bits each."""

    pixels: Pillow.Image


def decode(images: Sequence[Image]) -> tuple[DecodedImage, ...]:
    """Pixels of all images of a job; those that have them already stay as they are. A large one takes a second or two:
    call it from a thread that may take that long.

    Raises ValueError, naming the image, for one that does not decode, and for more than MAX_JOB_PIXELS together.
    """
    decoded: list[DecodedImage] = []
    room_pixels = MAX_JOB_PIXELS
    for index, image in enumerate(images):
        if not isinstance(image, DecodedImage):
            image = _decode(f"image {index + 1} of {len(images)}", image, room_pixels)  # noqa: PLW2901
        room_pixels -= image.pixels.width * image.pixels.height
        decoded.append(image)
    return tuple(decoded)


def _decode(name: str, image: Image, room_pixels: int) -> DecodedImage:
    try:
        with Pillow.open(io.BytesIO(image.data), formats=FORMATS) as file:
            width_px, height_px = file.size
            # By the header: nothing is decoded that does not fit.
            too_many = width_px * height_px > room_pixels
            pixels = None if too_many else exif_transpose(file).convert("RGB")
    except _DAMAGED as error:
        raise ValueError(f"images: {name} does not decode: {error or type(error).__name__}") from None
    if pixels is None:
        raise ValueError(
            f"images: {name} has {width_px} x {height_px} pixels, with which they are more than the "
            f"{MAX_JOB_PIXELS} that a job's images may have together"
        )
    return DecodedImage(image.data, image.mime_type, pixels)
