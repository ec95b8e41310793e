"""How many bytes a tensor-parallel rank exchanges in a step: the formula that `group.Ranks` is held to."""

from __future__ import annotations

from cluster.checkpoint import ModelConfig
from deployments.engine.torch_tp.decision import STATS, TOKEN_DIGITS

STAT_BYTES = 8


def step_bytes(config: ModelConfig, world: int, canvases: int, encode_tiles: int, element_bytes: int) -> int:
    """What one rank sends, and receives as much, in a step of `canvases` denoising and `encode_tiles` causal tiles.

    With R = canvas_tokens rows a tile, H = hidden_size, L layers, b = `element_bytes` of the run dtype and n = `world`:

        summed a tile      R b H (1 + 3 L)   embedding with self-conditioning; attention, and the feed-forward's two
                                             branches, of every layer
        summed a canvas    R b (H + 3)       the next self-conditioning, and the drawn token in 3 digits
        gathered a canvas  40 R              5 float64 of softmax statistics a position
        sent               2 (n - 1) / n * summed + (n - 1) * gathered      (rings)

    Nothing depends on the size of the vocabulary, of the experts, or on the length of contexts.
    """
    rows, hidden = config.canvas_tokens, config.hidden_size
    tile = rows * element_bytes * hidden * (1 + 3 * len(config.layers))
    summed = (canvases + encode_tiles) * tile + canvases * rows * element_bytes * (hidden + TOKEN_DIGITS)
    gathered = canvases * rows * STATS * STAT_BYTES
    return 2 * (world - 1) * summed // world + (world - 1) * gathered
