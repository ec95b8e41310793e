"""Typed, strict reading of one JSON object of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import CheckpointError


class JsonFields:
    """A JSON object; every complaint is a CheckpointError that names the file, field, value and rule."""

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._file, self._prefix = file, prefix

    @classmethod
    def of_file(cls, file: Path) -> JsonFields:
        """Reads a whole file, which must hold one object."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; copy it from the original checkpoint") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: must hold one JSON object; download it again")
        return cls(file, values)

    def refuse(self, name: str, rule: str) -> NoReturn:
        found = f"is {self.values[name]!r}" if name in self.values else "is missing"
        raise CheckpointError(f"{self._file}: {self._prefix}{name} {found}; {rule}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, low: int = 1, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.refuse(name, f"it must be an integer of at least {low}")
        return value

    def number(self, name: str, *, above: float = 0.0, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "it must be a number")
        if not (value > above and math.isfinite(value)):
            self.refuse(name, f"it must be finite and above {above:g}")
        return float(value)

    def require(self, name: str, *allowed: object) -> None:
        """The field must be one of `allowed`; None allows it to be absent."""
        if self.values.get(name) not in allowed:
            self.refuse(name, "Easel runs only " + " or ".join(repr(choice) for choice in allowed))

    def child(self, name: str) -> JsonFields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.refuse(name, "it must be an object")
        return JsonFields(self._file, value, f"{self._prefix}{name}.")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of ids, each in [0, vocab_size)."""
        value = self.values.get(name)
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            self.refuse(name, f"it must be a token id in [0, {vocab_size}) or a list of them")
        return ids
