"""The answer of one job as it grows: which tokens count, which text is final, and when a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.core import FinishReason

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """What one committed canvas adds to the answer; `finish` is set when the answer ends with it."""

    tokens: tuple[int, ...]
    text: str
    finish: FinishReason | None


class Answer:
    """Turns committed canvases into text deltas. Feeding the same canvases again gives the same deltas.

    Invariant: the texts of all pieces joined are the text of all their tokens, cut before the first stop string.
    Text is held back while its last character may be incomplete, or while it may be the start of a stop string.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int],
        stop: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._left_tokens = max_new_tokens
        self._ends = frozenset(eos_token_ids)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._sent_characters = 0

    def add(self, canvas: Sequence[int]) -> Piece:
        """Take the next canvas (all its tokens) and say what it adds."""
        tokens, finish = self._own_tokens(canvas)
        kept, text, stopped = self._text_with(tokens)
        finish = FinishReason.STOP if stopped else finish
        self._tokens.extend(kept)
        self._left_tokens -= len(kept)
        visible = len(text) if finish else self._safe_length(text)
        delta = text[self._sent_characters : max(visible, self._sent_characters)]
        self._sent_characters += len(delta)
        return Piece(tuple(kept), delta, finish)

    def _own_tokens(self, canvas: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        end = next((i for i, token in enumerate(canvas) if token in self._ends), None)
        own = list(canvas if end is None else canvas[:end])
        if len(own) > self._left_tokens or (end is None and len(own) == self._left_tokens):
            return own[: self._left_tokens], FinishReason.LENGTH
        return own, None if end is None else FinishReason.EOS

    def _text_with(self, tokens: list[int]) -> tuple[list[int], str, bool]:
        text = self._decode(self._tokens + tokens)
        # Nothing before this point can be part of a match: it would have been held back.
        hits = [at for at in (text.find(word, self._sent_characters) for word in self._stop) if at >= 0]
        if not hits:
            return tokens, text, False
        cut = min(hits)
        return self._shortest(tokens, cut), text[:cut], True

    def _shortest(self, tokens: list[int], characters: int) -> list[int]:
        """The fewest of `tokens` whose text reaches the cut: the answer's tokens agree with its text."""
        low, high = 0, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode(self._tokens + tokens[:middle])) >= characters:
                high = middle
            else:
                low = middle + 1
        return tokens[:low]

    def _safe_length(self, text: str) -> int:
        end = len(text)
        # A token may end in the middle of a UTF-8 character, which decodes as a replacement until it is whole.
        while end > 0 and len(text) - end < LONGEST_CHARACTER_BYTES and text[end - 1] == REPLACEMENT:
            end -= 1
        for word in self._stop:
            longest = min(len(word) - 1, end)
            for size in range(longest, 0, -1):
                if word.startswith(text[end - size : end]):
                    end -= size
                    break
        return end
