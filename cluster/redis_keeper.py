"""Keeps a redis-server running: one that ended by itself is started again, on its port and with its data."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.errors import StartupError
from cluster.redis_server import RedisServer

logger = logging.getLogger(__name__)

TRIES = 5
WINDOW_S = 60.0
START_TIMEOUT_S = 30.0
LOOK_S = 0.2


class RedisKeeper:
    """Looks after one server, which it does not own."""

    def __init__(self, server: RedisServer, *, tries: int = TRIES, window_s: float = WINDOW_S) -> None:
        """`tries` bounds the starts within `window_s`, and those in a row that fail."""
        self._server = server
        self._tries = tries
        self._window_s = window_s
        self._started_s: list[float] = []
        self._failed = 0

    def look(self) -> bool:
        """Start the server if it has ended; True when that was done. A start that fails is for the next look to repeat.

        Raises StartupError when it has been started too often.
        """
        ended = self._server.ended()
        if ended is None:
            return False
        self._count(ended)
        logger.warning("redis-server at %s %s; starting it again", self._server.url, ended)
        try:
            self._server.start(START_TIMEOUT_S)
        except StartupError as error:
            self._failed += 1
            logger.warning("%s", error)
            return False
        self._failed = 0
        logger.warning("redis-server runs again at %s as process %d", self._server.url, self._server.pid)
        return True

    def _count(self, ended: str) -> None:
        now_s = time.monotonic()
        self._started_s = [at_s for at_s in self._started_s if now_s - at_s < self._window_s]
        if max(len(self._started_s), self._failed) >= self._tries:
            tried = f"{self._tries} starts" if self._failed else f"{self._tries} starts in {self._window_s:.0f} s"
            raise StartupError(
                f"redis-server at {self._server.url} {ended}; {tried} did not help, see {self._server.log}"
            )
        self._started_s.append(now_s)


def keep_running(server: RedisServer, stop: threading.Event, restarted: Callable[[], None]) -> None:
    """Look after a server until `stop` is set; calls `restarted` whenever it runs again.

    Raises StartupError when it has been started too often.
    """
    keeper = RedisKeeper(server)
    while not stop.wait(LOOK_S):
        if keeper.look():
            restarted()
