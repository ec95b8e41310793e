"""A router's look at Ray: which replicas have no place, and which cannot start."""

from __future__ import annotations

import logging
import threading

from ray.exceptions import RayError

from deployments.placement import waiting
from deployments.start_failures import failing

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


class PlacementWatch:
    """Asks again and again, on a thread of its own: Ray's tables can be asked only by a call that blocks."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._lines: tuple[str, ...] = ()
        self._closed = threading.Event()
        # A daemon, because a call to a Ray that does not answer must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="placement watch", daemon=True)

    def begin(self) -> None:
        """Start to look."""
        self._thread.start()

    def lines(self) -> tuple[str, ...]:
        """What Ray said last, see `waiting` and `failing`; empty while every replica has a place and starts."""
        return self._lines

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._lines = waiting(self._app_name) + failing(self._app_name)
            except (RayError, RuntimeError, OSError) as error:
                logger.warning("Ray does not say which replicas wait for a place: %s", error)
            self._closed.wait(LOOK_EVERY_S)
