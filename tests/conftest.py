"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Crew


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    # Imported late: most tests do without torch.
    from tests.ranks import Crew

    crew = Crew()
    yield crew
    crew.close()
