"""Packs examples into training rows: encoder tokens and noised canvases side by side, kept apart by masks.

Invariant of a row: every token has a segment (its example), a position (as at generation time) and a canvas,
named by the position where it starts; encoder tokens have NO_CANVAS. A canvas reads the encoder tokens before
its start.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from models.tasks import CANVAS_TOKENS, Example

PAD, EOS, BOS, TURN_START, TURN_END = 0, 1, 2, 3, 4
VOCAB_TOKENS = 128
NO_CANVAS = -1
PAD_LOSS_WEIGHT = 0.3


@dataclass(frozen=True)
class Pack:
    """Rows of tokens, each tensor of shape (rows, row_tokens) on the CPU.

    clean: int64, the true tokens. noised: int64, what the decoder sees. segment, position, canvas: int64.
    weight: float32, the weight of the token in the loss (0 for encoder tokens and free room).
    """

    clean: torch.Tensor
    noised: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    canvas: torch.Tensor
    weight: torch.Tensor

    @property
    def is_canvas(self) -> torch.Tensor:
        """Bool (rows, row_tokens)."""
        return self.canvas != NO_CANVAS


def prompt_tokens(prompt: str) -> list[int]:
    """The chat template of one user message: bos, <|turn>, text, <turn|>."""
    return [BOS, TURN_START, *prompt.encode("ascii"), TURN_END]


def answer_tokens(answer: str) -> list[int]:
    """The answer, EOS, and PAD up to whole canvases."""
    tokens = [*answer.encode("ascii"), EOS]
    return tokens + [PAD] * (-len(tokens) % CANVAS_TOKENS)


def segment_tokens(example: Example) -> int:
    """Tokens that an example takes in a row: encoder tokens (all but the last canvas) and every canvas."""
    return len(example.prompt) + 3 + 2 * len(answer_tokens(example.answer)) - CANVAS_TOKENS


def corrupt(rng: np.random.Generator, clean: np.ndarray, random_share: float) -> np.ndarray:
    """Uniform corruption of a canvas, int64 (canvas_tokens,): all random, clean prefix, or t ~ U(0, 1)."""
    noise = rng.integers(0, VOCAB_TOKENS, clean.shape)
    draw = rng.random()
    if draw < random_share:
        return noise
    if draw < random_share + 0.15:
        return np.where(np.arange(len(clean)) < rng.integers(0, len(clean)), clean, noise)
    return np.where(rng.random(clean.shape) < rng.random(), noise, clean)


def segment_columns(example: Example, rng: np.random.Generator, random_share: float) -> np.ndarray:
    """One example as columns (clean, noised, position, canvas), int64 of shape (tokens, 4)."""
    prompt, answer = prompt_tokens(example.prompt), np.array(answer_tokens(example.answer))
    encoder = np.concatenate([prompt, answer[:-CANVAS_TOKENS]])
    columns = [np.stack([encoder, encoder, np.arange(len(encoder)), np.full(len(encoder), NO_CANVAS)], 1)]
    for number, clean in enumerate(answer.reshape(-1, CANVAS_TOKENS)):
        start = len(prompt) + number * CANVAS_TOKENS
        noised, position = corrupt(rng, clean, random_share), start + np.arange(CANVAS_TOKENS)
        columns.append(np.stack([clean, noised, position, np.full_like(clean, start)], 1))
    return np.concatenate(columns)


class Packer:
    """Fills the `rows` rows of `row_tokens` tokens of one pack after another, first fit."""

    def __init__(self, rng: random.Random, rows: int, row_tokens: int) -> None:
        self._numbers = np.random.default_rng(rng.getrandbits(63))
        self._rows, self._row_tokens = rows, row_tokens

    def pack(self, examples: list[Example], random_share: float) -> tuple[Pack, list[Example]]:
        """Returns the pack and the examples that found no room (the caller gives them again)."""
        table = np.zeros((self._rows, self._row_tokens, 5), np.int64)
        table[:, :, 3] = NO_CANVAS
        used = [0] * self._rows
        count = [0] * self._rows
        left: list[Example] = []
        for example in examples:
            columns = segment_columns(example, self._numbers, random_share)
            row = next((r for r in range(self._rows) if used[r] + len(columns) <= self._row_tokens), None)
            if row is None:
                left.append(example)
                continue
            count[row] += 1
            table[row, used[row] : used[row] + len(columns), :4] = columns
            table[row, used[row] : used[row] + len(columns), 4] = count[row]
            used[row] += len(columns)
        clean, noised, position, canvas, segment = torch.from_numpy(table).unbind(-1)
        weight = torch.where(clean == PAD, PAD_LOSS_WEIGHT, 1.0) * (canvas != NO_CANVAS)
        return Pack(clean, noised, segment, position, canvas, weight), left


def attention_masks(pack: Pack, window_tokens: int) -> dict[str, torch.Tensor]:
    """Additive float32 masks (rows, 1, row_tokens, row_tokens) per layer type; 0 may attend, -inf may not.

    The sliding cache of transformers keeps window - 1 tokens, so a canvas reads that many before its start.
    """
    key_position, is_canvas = pack.position[:, None, :], pack.is_canvas
    same = pack.segment[:, :, None] == pack.segment[:, None, :]
    reads_canvas = same & is_canvas[:, :, None] & (pack.canvas[:, :, None] == pack.canvas[:, None, :])
    limit = torch.where(is_canvas, pack.canvas - 1, pack.position)[:, :, None]
    floor = torch.where(is_canvas, pack.canvas, pack.position)[:, :, None] - window_tokens
    reads_encoder = same & ~is_canvas[:, None, :] & (key_position <= limit)
    full, sliding = reads_canvas | reads_encoder, reads_canvas | (reads_encoder & (key_position > floor))
    zero, never = torch.tensor(0.0), torch.tensor(float("-inf"))
    return {
        "sliding_attention": torch.where(sliding, zero, never)[:, None],
        "full_attention": torch.where(full, zero, never)[:, None],
    }
