"""A canvas in progress as bytes: versioned, checksummed, readable by any replica of the same model."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.engine.admission import seal

FORMAT = 1


@dataclass(frozen=True, slots=True)
class CanvasState:
    """What one denoising step hands to the next.

    `tokens` int64 [canvas_tokens] is the noisy canvas, `argmax` int64 [canvas_tokens] the last prediction, and
    `unchanged_steps` for how many steps in a row before the last it was the same. `soft` float32 [canvas_tokens,
    hidden] is the self-conditioning embedding; `dtype` is the run dtype it was computed in.
    """

    tokens: NDArray[np.int64]
    argmax: NDArray[np.int64]
    soft: NDArray[np.float32]
    step: int
    unchanged_steps: int
    dtype: str


def pack(state: CanvasState) -> bytes:
    """Serialises with a sha256 in front."""
    body = io.BytesIO()
    np.savez(
        body,
        format=np.int64(FORMAT),
        tokens=state.tokens,
        argmax=state.argmax,
        soft=state.soft,
        counts=np.array([state.step, state.unchanged_steps], dtype=np.int64),
        dtype=np.array(state.dtype),
    )
    return seal(body.getvalue())


def unpack(body: bytes, canvas_tokens: int, hidden_size: int, dtype: str) -> CanvasState:
    """Reads what `pack` sealed. Raises ValueError for another format, model shape or run dtype."""
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        found = int(values["format"])
        step, unchanged_steps = (int(count) for count in values["counts"])
        state = CanvasState(
            tokens=values["tokens"],
            argmax=values["argmax"],
            soft=values["soft"],
            step=step,
            unchanged_steps=unchanged_steps,
            dtype=str(values["dtype"]),
        )
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint payload cannot be read: {error}") from None
    if found != FORMAT or state.dtype != dtype:
        raise ValueError(f"checkpoint has format {found} in {state.dtype}, this engine reads {FORMAT} in {dtype}")
    if state.soft.shape != (canvas_tokens, hidden_size) or state.tokens.shape != (canvas_tokens,):
        raise ValueError(f"checkpoint is of a canvas of shape {state.soft.shape}")
    return state
