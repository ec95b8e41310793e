"""The growing answer: its text, its tokens and its end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import FinishReason
from deployments.answer import Answer

EOS, PAD = 1, 0


def letters(tokens: Sequence[int]) -> str:
    """One character a token, none for special tokens."""
    return "".join(chr(token) for token in tokens if token > 2)


def utf8_bytes(tokens: Sequence[int]) -> str:
    """One byte a token, as byte-level tokenizers do."""
    return bytes(tokens).decode(errors="replace")


def answer(*stop: str, max_new_tokens: int = 100) -> Answer:
    return Answer(letters, max_new_tokens=max_new_tokens, eos_token_ids=(EOS,), stop=stop)


def canvas(text: str, size: int = 8, end: bool = False) -> list[int]:
    tokens = [ord(character) for character in text] + ([EOS] if end else [])
    return tokens + [PAD] * (size - len(tokens))


def test_an_answer_ends_before_its_eos_and_counts_no_padding() -> None:
    piece = answer().add(canvas("four", end=True))
    assert (piece.text, len(piece.tokens), piece.finish) == ("four", 4, FinishReason.EOS)


def test_an_answer_of_exactly_max_new_tokens_ends_by_length() -> None:
    growing = answer(max_new_tokens=12)
    assert growing.add(canvas("abcdefgh")).finish is None
    last = growing.add(canvas("ijklmnop"))
    assert (last.text, last.finish) == ("ijkl", FinishReason.LENGTH)


def test_an_eos_right_at_the_limit_is_an_eos() -> None:
    assert answer(max_new_tokens=4).add(canvas("four", end=True)).finish is FinishReason.EOS


def test_an_eos_behind_the_limit_is_a_length() -> None:
    assert answer(max_new_tokens=3).add(canvas("four", end=True)).finish is FinishReason.LENGTH


def test_a_stop_string_across_two_canvases_never_shows() -> None:
    growing = answer("END")
    first = growing.add(canvas("say: E  "[:6] + "EN"))
    assert first.text == "say: E"
    second = growing.add(canvas("D then x"))
    assert (second.text, second.finish) == ("", FinishReason.STOP)


def test_held_back_text_comes_when_it_was_no_stop_string() -> None:
    growing = answer("END")
    assert growing.add(canvas("abcdefEN")).text == "abcdef"
    assert growing.add(canvas("T", end=True)).text == "ENT"


def test_the_tokens_agree_with_the_text_when_a_stop_string_cuts() -> None:
    piece = answer("|").add(canvas("ab|cd", end=True))
    assert (piece.text, letters(piece.tokens), piece.finish) == ("ab", "ab", FinishReason.STOP)


def test_a_character_split_over_two_canvases_is_sent_whole() -> None:
    growing = Answer(utf8_bytes, max_new_tokens=100, eos_token_ids=(255,))
    euro = list("a€b".encode())
    assert growing.add(euro[:2]).text == "a"
    assert growing.add([*euro[2:], 255]).text == "€b"


@given(st.text(alphabet="abEND", max_size=40), st.integers(1, 9), st.sampled_from([(), ("END",), ("ab", "ND")]))
def test_the_pieces_join_to_the_whole_text_cut_before_the_first_stop(
    text: str, size: int, stop: tuple[str, ...]
) -> None:
    growing, got, finish = answer(*stop), "", None
    tokens = [*map(ord, text), EOS]
    tokens += [PAD] * (-len(tokens) % size)
    for start in range(0, len(tokens), size):
        piece = growing.add(tokens[start : start + size])
        got, finish = got + piece.text, piece.finish
        if finish is not None:
            break
    cuts = [at for at in (text.find(word) for word in stop) if at >= 0]
    # Streaming stops at the match that is complete first; two stop strings can overlap within a canvas.
    if not cuts:
        assert (got, finish) == (text, FinishReason.EOS)
    else:
        assert finish is FinishReason.STOP
        assert all(word not in got for word in stop)
        assert text.startswith(got)


@pytest.mark.parametrize("stop", [(), ("END",)])
def test_replaying_the_same_canvases_gives_the_same_pieces(stop: tuple[str, ...]) -> None:
    canvases = [canvas("abcdefEN"), canvas("T more", end=True)]
    once, again = answer(*stop), answer(*stop)
    assert [once.add(item) for item in canvases] == [again.add(item) for item in canvases]
