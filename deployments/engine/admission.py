"""What every engine checks before it takes a job, so that all of them refuse alike."""

from __future__ import annotations

import hashlib

from cluster.core import MAX_SEED, ModelCard
from deployments.engine.api import CanvasCheckpoint, EngineJob

DIGEST_BYTES = 32


def check_job(card: ModelCard, job: EngineJob, *, takes_images: bool = False) -> None:
    """Raises ValueError, with one line that says what is wrong, if `job` does not fit the model, or the engine."""
    canvases = card.canvases_for(job.sampling.max_new_tokens)
    if not job.prompt_tokens:
        raise ValueError("prompt_tokens is empty; a prompt has at least one token")
    if job.sampling.max_new_tokens < 1 or job.sampling.max_denoising_steps < 1:
        raise ValueError("max_new_tokens and max_denoising_steps must be at least 1")
    if not 0 <= job.sampling.seed <= MAX_SEED:
        raise ValueError(f"seed is {job.sampling.seed}; it must be in [0, 2^64)")
    _check_tokens(card, "prompt_tokens", job.prompt_tokens)
    if job.images:
        _check_images(card, job, takes_images)
    if len(job.committed) >= canvases:
        raise ValueError(f"{len(job.committed)} canvases are committed, the job has only {canvases}")
    for index, canvas in enumerate(job.committed):
        if len(canvas) != card.canvas_tokens:
            raise ValueError(f"committed canvas {index} has {len(canvas)} tokens, not {card.canvas_tokens}")
        _check_tokens(card, f"committed canvas {index}", canvas)
    prompt_tokens = card.context_tokens(len(job.prompt_tokens), len(job.images))
    needed = prompt_tokens + canvases * card.canvas_tokens
    if needed > card.max_context_tokens:
        raise ValueError(
            f"prompt of {prompt_tokens} tokens and {canvases} canvases need {needed} positions; "
            f"the model has {card.max_context_tokens}"
        )


def _check_images(card: ModelCard, job: EngineJob, takes_images: bool) -> None:
    if not takes_images or card.vision is None:
        which = "the engine takes none" if not takes_images else "the checkpoint has no vision part"
        raise ValueError(f"images: the job brings {len(job.images)}; {which}")
    places = job.prompt_tokens.count(card.vision.image_token_id)
    if places != len(job.images):
        raise ValueError(f"images: the job brings {len(job.images)}, its prompt has places for {places}")


def _check_tokens(card: ModelCard, name: str, tokens: tuple[int, ...]) -> None:
    if min(tokens) < 0 or max(tokens) >= card.vocab_size:
        bad = next(token for token in tokens if not 0 <= token < card.vocab_size)
        raise ValueError(f"{name} holds token {bad}, outside [0, {card.vocab_size})")


def seal(body: bytes) -> bytes:
    """Puts the sha256 of `body` before it."""
    return hashlib.sha256(body).digest() + body


def open_checkpoint(card: ModelCard, job: EngineJob, checkpoint: CanvasCheckpoint) -> bytes:
    """The body that `seal` was given. Raises ValueError for another model, another canvas, or damage."""
    if checkpoint.version != card.version:
        raise ValueError(f"checkpoint is of model version {checkpoint.version}, this is {card.version}")
    if checkpoint.canvas_index != len(job.committed):
        raise ValueError(
            f"checkpoint is of canvas {checkpoint.canvas_index}, the job continues at {len(job.committed)}"
        )
    digest, body = checkpoint.payload[:DIGEST_BYTES], checkpoint.payload[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("checkpoint payload is damaged: its checksum does not match")
    return body
