"""What tests of the command share: a router to talk to, and no cluster of this machine in sight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.fake_router import Served, serve_in_thread


@pytest.fixture
def served() -> Iterator[Served]:
    """A router on a thread of its own."""
    with serve_in_thread() as running:
        yield running


@pytest.fixture
def no_local_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands find no cluster by themselves."""
    monkeypatch.setenv("EASEL_HOME", str(tmp_path))
    monkeypatch.delenv("EASEL_ADDRESS", raising=False)
