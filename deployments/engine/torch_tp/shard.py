"""Which part of every matrix one rank of a tensor-parallel group holds.

Heads are cut evenly. Inner columns of the feed-forwards and the vocabulary are cut as evenly as their size allows:
parts may differ, nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from cluster.checkpoint import LayerConfig, ModelConfig

# Grouped products on CUDA want rows of a multiple of 16 bytes.
UNIT = 8


@dataclass(frozen=True, slots=True)
class HeadCut:
    """One rank's heads of one layer: query heads [queries.start, queries.stop), and the checkpoint's kv head of each
    of this rank's kv heads. A kv head may be on several ranks, and twice on one."""

    queries: slice
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def cut(self, size: int) -> slice:
        """This rank's part of `size` columns, rows or tokens; all parts together are the whole, in order."""
        unit = UNIT if size % UNIT == 0 and size // UNIT >= self.world else 1
        units = size // unit
        return slice(self.rank * units // self.world * unit, (self.rank + 1) * units // self.world * unit)

    def heads(self, config: ModelConfig, layer: LayerConfig) -> HeadCut:
        """The heads of `layer`; `config` is the whole model's.

        Neighbouring query heads share a kv head, `shared` of them in the checkpoint. On a rank, the largest runs that
        never mix two kv heads are gcd(own, shared) long, and each run gets its kv head.
        """
        own, shared = config.attention_heads // self.world, config.attention_heads // layer.kv_heads
        first, run = self.rank * own, gcd(own, shared)
        return HeadCut(slice(first, first + own), tuple(head // shared for head in range(first, first + own, run)))

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank's attention, cache and plans see it: with its heads only."""
        layers = tuple(replace(layer, kv_heads=len(self.heads(config, layer).kv_heads)) for layer in config.layers)
        return replace(config, attention_heads=config.attention_heads // self.world, layers=layers)
