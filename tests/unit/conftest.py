"""What tests of the command share: a router to talk to, and no cluster of this machine in sight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.fake_router import Served, serve_in_thread

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A trained checkpoint, for whom any will do."""
    # Imported late: most tests do without torch.
    import torch

    from cluster.checkpoint import read_checkpoint
    from tests.oracle import some_checkpoint

    torch.set_num_threads(1)
    path = some_checkpoint()
    if path is None:
        pytest.skip("no checkpoint is here")
    return read_checkpoint(path)


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
