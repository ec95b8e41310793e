"""What periodic checkpoints cost: `python -m benchmarks.checkpoints`. The last line is one JSON object.

A router, a replica and a real Redis, with 8 slots full and an engine of 15 ms a step whose checkpoints have the size of
the 26B model's (256 x 2816 float32: 2.9 MB). Each figure is tokens/s with a checkpoint every N steps over tokens/s with
none, in the same run.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path

from benchmarks.stack import CHECKPOINT, SLOTS, STEP_MS, STEPS_PER_CANVAS
from cluster.checkpoint import read_checkpoint
from cluster.client import EaselClient
from cluster.config import Settings, parse_settings
from cluster.redis_server import RedisServer
from deployments.engine.api import CanvasCheckpoint
from deployments.engine.fake import FakeEngine
from deployments.replica import Replica
from deployments.router import Router
from deployments.tokenizer import Tokenizer

PAYLOAD_BYTES = 256 * 2816 * 4
CANVASES = 4
ROUNDS = 3
EVERY_STEPS = (16, 8, 4, 1)


class WeightyEngine(FakeEngine):
    """The fake engine with checkpoints as large as a real model's."""

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """See `Engine.checkpoint`; nobody resumes from these."""
        found = super().checkpoint(job_id)
        if found is None:
            return None
        return CanvasCheckpoint(found.version, found.canvas_index, found.step, bytes(PAYLOAD_BYTES))


def main() -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory(prefix="easel-bench-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            figures = asyncio.run(_measure(server.url))
        finally:
            server.stop()
    print(json.dumps(figures))


async def _measure(url: str) -> dict[str, float]:
    without = await _tokens_per_s(url, 0)
    figures = {}
    for every in EVERY_STEPS:
        # Each beside a baseline of its own: the machine is shared, and its speed changes.
        ratio = await _tokens_per_s(url, every) / without
        without = await _tokens_per_s(url, 0)
        figures[f"every_{every}_steps_over_none"] = round(ratio, 3)
        print(f"  a checkpoint of {PAYLOAD_BYTES / 1e6:.1f} MB every {every:>2} steps: {ratio:.3f} of none", flush=True)
    return figures


async def _tokens_per_s(url: str, every_steps: int) -> float:
    settings = _settings(url, every_steps)
    card = read_checkpoint(CHECKPOINT).card
    engine = WeightyEngine(card, slots=SLOTS, steps_per_canvas=STEPS_PER_CANVAS, step_time_ms=STEP_MS)
    replica = Replica(settings, engine, Tokenizer(CHECKPOINT).decode, name="bench", advertised_host="127.0.0.1")
    router = Router(settings, name="bench-router")
    await replica.start()
    try:
        port = await router.start()
        async with EaselClient(f"127.0.0.1:{port}") as client:
            await client.generate(tokens=[5, 6, 7], max_new_tokens=card.canvas_tokens)
            start_s = time.perf_counter()
            tokens = sum(await asyncio.gather(*(_caller(client, slot, card.canvas_tokens) for slot in range(SLOTS))))
            return tokens / (time.perf_counter() - start_s)
    finally:
        await router.close()
        await replica.close()


async def _caller(client: EaselClient, slot: int, canvas_tokens: int) -> int:
    done = 0
    for turn in range(ROUNDS):
        answer = await client.generate(
            tokens=[5, 6, 7], seed=slot + SLOTS * turn, max_new_tokens=CANVASES * canvas_tokens
        )
        done += len(answer.token_ids)
    return done


def _settings(url: str, every_steps: int) -> Settings:
    return parse_settings(
        {
            "checkpoint": str(CHECKPOINT),
            "log_level": "WARNING",
            "state": {"url": url, "namespace": f"every-{every_steps}"},
            "router": {"port": 0, "drain_timeout_s": 1.0},
            "denoiser": {"checkpoint_every_steps": every_steps, "drain_timeout_s": 1.0},
        }
    )


if __name__ == "__main__":
    main()
