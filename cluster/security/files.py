"""Mounted files that change while the process runs: certificates, keys, passwords."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from cluster.errors import ConfigError

Loaded = TypeVar("Loaded")
Signature = tuple[tuple[int, ...] | None, ...]

_log = logging.getLogger(__name__)


def read_file(setting: str, path: str) -> bytes:
    """What is in a file that a setting names. Raises ConfigError with the setting when it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from None


class Reloaded(Generic[Loaded]):
    """What `load` makes of some files, made anew when one of them changes. May be asked from any thread.

    Files are watched by what they lead to, so that the swap of a link counts, as Kubernetes does it for secrets. New
    content that cannot be used is logged once, and the last good one stays: a mistake locks nobody out. Raises what
    `load` raises, at the start only.
    """

    def __init__(self, paths: tuple[str, ...], load: Callable[[], Loaded]) -> None:
        self._paths = paths
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._current = load()

    def current(self) -> Loaded:
        """The content as it is now, or was when it could be used last."""
        with self._lock:
            # Read before the files are: a change between the two is found the next time.
            found = self._signature()
            if found != self._seen:
                self._seen = found
                try:
                    self._current = self._load()
                except ConfigError as error:
                    _log.error("kept what was read before: %s", error)
                else:
                    _log.info("read again: %s", ", ".join(self._paths))
            return self._current

    def _signature(self) -> Signature:
        return tuple(_stat(path) for path in self._paths)


def _stat(path: str) -> tuple[int, ...] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
