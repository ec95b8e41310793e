"""Images in chat messages: what they may be, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import Image, Turn, Violation, VisionCard
from cluster.errors import InvalidRequest
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.images import MAX_IMAGE_BYTES, MAX_IMAGES, bad_images
from cluster.rpc.requests import ParsedRequest, digest_of, parse_generate
from tests.unit.fake_router import CARD, IMAGE_TOKEN, Characters
from tests.unit.images import animation, asked, picture

SEEING = replace(CARD, vision=VisionCard(IMAGE_TOKEN, 50))
KINDS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def parse(request: v1.GenerateRequest) -> ParsedRequest:
    return parse_generate(request, SEEING, Characters(), deadline_ms=None, new_id=lambda: "made", new_seed=lambda: 9)


def violations(request: v1.GenerateRequest) -> list[Violation]:
    with pytest.raises(InvalidRequest) as caught:
        parse(request)
    return list(caught.value.violations)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_every_kind_is_taken_with_its_bytes_as_they_are(kind: str) -> None:
    data = picture(kind)
    parsed = parse(asked("a", data, "b"))
    assert parsed.images == (Image(data, KINDS[kind]),)
    assert parsed.spec.prompt_tokens == (2, ord("a"), IMAGE_TOKEN, ord("b"))
    assert parsed.spec.image_count == 1


def test_images_keep_their_order_over_all_messages() -> None:
    first, second, third = (picture(width_px=width) for width in (5, 6, 7))
    request = asked(first, "x", second)
    request.messages.add(role=v1.ROLE_ASSISTANT, content="y")
    request.messages.append(asked(third).messages[0])
    assert [image.data for image in parse(request).images] == [first, second, third]


def test_parts_without_an_image_are_joined_to_one_text() -> None:
    seen: list[Turn] = []

    class Recorder(Characters):
        def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
            seen.extend(messages)
            return super().encode_messages(messages)

    parse_generate(asked("a ", "b"), CARD, Recorder(), deadline_ms=None, new_id=lambda: "j", new_seed=lambda: 1)
    assert seen == [("user", "a b")]


def test_an_image_needs_no_text_beside_it() -> None:
    assert parse(asked(picture())).spec.prompt_tokens == (2, IMAGE_TOKEN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_mime_type_must_be_that_of_the_data(kind: str) -> None:
    request = asked(picture(kind))
    request.messages[0].parts[0].image.mime_type = KINDS[kind]
    parse(request)
    request.messages[0].parts[0].image.mime_type = "image/gif"
    what = f"is 'image/gif', but the data is {KINDS[kind]}; name that, or nothing"
    assert violations(request) == [Violation("messages[0].parts[0].image.mime_type", what)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is 0 bytes; allowed are 1 to 4194304"),
        (b"\x89PNG\r\n\x1a\n" + bytes(MAX_IMAGE_BYTES), f"is {MAX_IMAGE_BYTES + 8} bytes; allowed are 1 to"),
        (b"GIF89a" + bytes(40), "begins with b'GIF89a\\x00\\x00', which no known kind does; allowed are image/png, "),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "which no known kind does"),
        (b"text", "which no known kind does"),
        (picture("PNG")[:40], "is a damaged image/png: "),
        (picture("PNG")[:-14], "is a damaged image/png: "),
        (picture("JPEG")[:-2], "is a damaged image/jpeg: its end is missing"),
        (picture("WEBP")[:-5], "is a damaged image/webp: "),
        (picture("PNG", 8193, 1), "is 8193 x 1 pixels; allowed are sides of 1 to 8192 and 33554432 in all"),
        (picture("PNG", 6000, 5600), "is 6000 x 5600 pixels; "),
        (animation("PNG"), "has 2 frames; only still images are allowed"),
        (animation("WEBP"), "has 2 frames; only still images are allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_image_is_refused_with_its_place_and_what_is_allowed(data: bytes, said: str) -> None:
    (found,) = violations(asked("look", data))
    assert found.field == "messages[0].parts[1].image.data"
    assert said in found.description


def test_too_many_images_and_too_many_bytes_are_refused_as_a_whole() -> None:
    (found,) = violations(asked(*[picture()] * (MAX_IMAGES + 1)))
    assert found == Violation("messages", "hold 17 images; at most 16 are allowed")
    padded = picture() + bytes(MAX_IMAGE_BYTES - 1000)
    (found,) = violations(asked(*[padded] * 5))
    assert found.description.endswith("bytes in all; at most 16777216 are allowed")


def test_parts_are_checked_like_content() -> None:
    both = asked("a")
    both.messages[0].content = "b"
    empty = asked()
    empty.messages[0].parts.add()
    system = asked(picture(), role=v1.ROLE_SYSTEM)
    for request, field, said in (
        (both, "messages[0].parts", "is set as well as content"),
        (empty, "messages[0].parts[0]", "is empty; exactly one of text and image must be set"),
        (asked(" "), "messages[0].parts", "holds no image and no text"),
        (system, "messages[0].parts[0].image", "is in a message of ROLE_SYSTEM; images are for ROLE_USER"),
    ):
        found = violations(request)[0]
        assert (found.field, said in found.description) == (field, True)


def test_a_text_that_spells_the_image_token_cannot_take_an_images_place() -> None:
    (found,) = violations(asked(picture(), chr(IMAGE_TOKEN)))
    assert "hold 1 images, but the model's chat template makes 2 image tokens of them" in found.description


def test_an_image_takes_its_room_in_the_context() -> None:
    parse(asked(*[picture()] * 4))
    (found,) = violations(asked(*[picture()] * 5))
    assert "is 251 tokens long with its 5 images; at most 248 fit" in found.description
    request = asked(*[picture()] * 4)
    request.sampling.max_new_tokens = 56
    (found,) = violations(request)
    assert "allowed is 1 to 48: the context holds 256 tokens and the prompt has 201" in found.description


def test_another_image_is_another_body() -> None:
    digests = {digest_of(asked("a", picture(width_px=width))) for width in (5, 6)}
    assert len(digests) == 2
    assert digest_of(asked("a", picture(width_px=5))) in digests


@given(st.sampled_from(list(KINDS)), st.data())
def test_whatever_a_file_holds_it_is_taken_or_refused(kind: str, drawn: st.DataObject) -> None:
    data = bytearray(picture(kind))
    for _ in range(drawn.draw(st.integers(1, 6))):
        data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    cut = drawn.draw(st.integers(0, len(data)))
    for violation in bad_images(asked(bytes(data[:cut])).messages):
        assert violation.field.startswith("messages[0].parts[0].image.")
        assert "\n" not in violation.description
