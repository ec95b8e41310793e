"""Images become pixels, or their job is refused."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image as Pillow

from cluster.core import Image
from deployments.engine import pixels
from deployments.engine.pixels import decode
from tests.unit.images import damaged, picture

PNG = "image/png"


def colour(image: Image) -> object:
    (decoded,) = decode([image])
    return decoded.pixels.getpixel((0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_of_every_kind_become_pixels_of_three_bytes(kind: str) -> None:
    image = Image(picture(kind), f"image/{kind.lower()}")
    (decoded,) = decode([image])
    assert (decoded.pixels.mode, decoded.pixels.size) == ("RGB", (8, 6))
    assert (decoded.data, decoded.mime_type) == (image.data, image.mime_type)
    assert decode([decoded])[0] is decoded


def test_other_colour_models_become_rgb() -> None:
    for mode, value in (("L", 7), ("RGBA", (7, 7, 7, 255)), ("P", 0)):
        file = io.BytesIO()
        Pillow.new(mode, (3, 2), value).save(file, "PNG")
        assert colour(Image(file.getvalue(), PNG)) in ((7, 7, 7), (0, 0, 0))


def test_a_photo_is_turned_as_its_camera_was_held() -> None:
    file, exif = io.BytesIO(), Pillow.Exif()
    exif[0x0112] = 6
    Pillow.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    (decoded,) = decode([Image(file.getvalue(), "image/jpeg")])
    assert decoded.pixels.size == (4, 8)


def test_what_does_not_decode_is_refused_by_its_place() -> None:
    for data in (damaged(), b"no image", picture()[:40]):
        with pytest.raises(ValueError, match="images: image 2 of 2 does not decode"):
            decode([Image(picture(), PNG), Image(data, PNG)])


def test_other_kinds_of_files_are_not_opened() -> None:
    with pytest.raises(ValueError, match="images: image 1 of 1 does not decode"):
        decode([Image(picture("GIF"), PNG)])


def test_a_bomb_is_not_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ValueError, match="images: image 1 of 1 does not decode"):
        decode([Image(b"\x89PNG\r\n\x1a\n" + chunk + chunk, PNG)])


def test_the_images_of_a_job_have_so_many_pixels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_JOB_PIXELS", 100)
    images = [Image(picture(), PNG)] * 3
    assert len(decode(images[:2])) == 2
    with pytest.raises(ValueError, match=r"images: image 3 of 3 has 8 x 6 pixels, .* more than the 100"):
        decode(images)
