"""The safetensors files of a checkpoint, by their headers only: which tensors lie where."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.json_fields import JsonFields

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset_bytes` counts from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int

    def read_scalar(self) -> float:
        """The first element, for tensors of one."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset_bytes)
            raw = stream.read(DTYPE_BYTES[self.dtype])
        if self.dtype == "BF16":  # the upper half of a little-endian float32
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        return float(struct.unpack("<f" if self.dtype == "F32" else "<e", raw)[0])


SAMPLES = 256
SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file's announced tensors. `fingerprint` is what the model version hashes: header, size, samples of data."""

    tensors: Mapping[str, TensorEntry]
    fingerprint: bytes


def find_weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the single file."""
    index = folder / INDEX_FILE
    if not index.exists():
        return [folder / WEIGHTS_FILE]
    names = set(JsonFields.of_file(index).child("weight_map").values.values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: weight_map must map tensors to file names in this folder; download it again")
    return [folder / name for name in sorted(names)]


def read_weight_file(file: Path) -> WeightFile:
    """Reads a header: 8 bytes of length, JSON, then data (the safetensors format). Raises CheckpointError."""
    try:
        file_bytes = file.stat().st_size
        raw = _read_raw_header(file, file_bytes)
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(file, 8 + len(raw), value) for name, value in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; copy it from the original checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: bad safetensors header ({error}); download it again") from None
    ends_bytes = (entry.offset_bytes + entry.size_bytes for entry in tensors.values())
    announced_bytes = max(ends_bytes, default=8 + len(raw))
    if announced_bytes != file_bytes:
        raise CheckpointError(
            f"{file}: truncated: it has {file_bytes} bytes, its header announces {announced_bytes}; download it again"
        )
    return WeightFile(tensors, raw + struct.pack("<Q", file_bytes) + _samples(file, file_bytes))


def _samples(file: Path, file_bytes: int) -> bytes:
    """Blocks at even distances: two trainings of one shape differ in every one, and 50 GB are not read for it.

    A file of up to SAMPLES * SAMPLE_BYTES is taken whole.
    """
    stride_bytes = max(SAMPLE_BYTES, -(-file_bytes // SAMPLES))
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for offset_bytes in range(0, file_bytes, stride_bytes):
            stream.seek(offset_bytes)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


def _read_raw_header(file: Path, file_bytes: int) -> bytes:
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{file}: truncated or not a safetensors file; download it again")
        return stream.read(int(header_bytes))


def _entry(file: Path, data_start_bytes: int, value: Mapping[str, Any]) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    wanted_bytes = math.prod(shape) * DTYPE_BYTES.get(value["dtype"], 0)
    if not 0 <= begin <= end or (value["dtype"] in DTYPE_BYTES and wanted_bytes != end - begin):
        raise ValueError(f"data_offsets [{begin}, {end}] do not hold a {value['dtype']} {list(shape)}")
    return TensorEntry(file, value["dtype"], shape, data_start_bytes + begin, end - begin)
